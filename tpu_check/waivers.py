"""Limits that cannot be kept, each with the looser bound that is kept instead and the reason."""

from tpu_check.limits import Waiver

WAIVERS: tuple[Waiver, ...] = ()
