"""`recycled policies`: what can be decoded with."""

import inspect
import textwrap

from recycled_jax.flags import describe_type, knobs_of
from recycled_jax.policies import POLICIES

WIDTH = 100


def policies() -> None:
    """Lists the policies: name, description, and knobs with type and default."""
    for name, factory in POLICIES.items():
        print(name)
        description = " ".join((inspect.getdoc(factory) or "").split())
        print(textwrap.fill(description, WIDTH, initial_indent="  ", subsequent_indent="  "))
        for knob, (hint, default) in knobs_of(name).items():
            print(f"    --policy.{knob}: {describe_type(hint)} = {'none' if default is None else default}")
        print()
