"""Which implementation runs, and what is said when none does."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import decode_attention, dispatch
from tests.pallas_kernels.arg_specs import ARG_SPECS, cache_arguments


def declines(x):
    raise NotImplementedError(f"no {x}")


def test_automatic_choice_can_be_read_from_the_program(getkey):
    args = cache_arguments(ARG_SPECS[0], getkey)
    compiled = jax.jit(decode_attention).lower(args.q, args.cache(), args.lengths).compile()
    # With the last slash it is a scope; without, the path of the source file would do.
    assert "/decode_attention/xla/" in compiled.as_text()


def test_unknown_name_lists_the_valid_ones(getkey):
    args = cache_arguments(ARG_SPECS[0], getkey)
    with pytest.raises(ValueError, match=r"implementation='fast' .* decode_attention; .* one of: .*reference, xla"):
        decode_attention(args.q, args.cache(), args.lengths, implementation="fast")


def test_named_implementation_never_falls_back():
    with pytest.raises(NotImplementedError, match="no 3"):
        dispatch.run("double", {"picky": declines, "xla": lambda x: 2 * x}, "picky", 3)


def test_automatic_choice_takes_the_first_that_accepts(monkeypatch):
    monkeypatch.setitem(dispatch.AUTOMATIC, jax.default_backend(), ("absent", "picky", "xla"))
    assert dispatch.run("double", {"xla": lambda x: 2 * x, "picky": declines}, None, 3) == 6


def test_if_nothing_fits_every_reason_is_reported(monkeypatch):
    monkeypatch.setitem(dispatch.AUTOMATIC, jax.default_backend(), ("picky", "xla"))
    with pytest.raises(NotImplementedError, match=r"double .*; picky: no 3; xla: no 3"):
        dispatch.run("double", {"xla": declines, "picky": declines}, None, 3)


def test_a_mistake_is_not_taken_for_a_refusal():
    def mistaken(x):
        raise ValueError(f"{x=} is odd")

    with pytest.raises(ValueError, match="x=3 is odd"):
        dispatch.run("double", {"xla": mistaken}, None, 3)


def test_every_platform_has_a_choice():
    assert all("xla" in names for names in dispatch.AUTOMATIC.values())
    assert jnp.zeros(()).device.platform in dispatch.AUTOMATIC
