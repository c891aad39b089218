"""The named policies. A factory's signature is its knobs, its docstring what `recycled policies` prints."""

import inspect
from collections.abc import Callable

from recycled_jax.policies.full import full
from recycled_jax.policies.policy import Policy
from recycled_jax.policies.recycled import recycled, recycled_dynamic
from recycled_jax.policies.streaming import streaming
from recycled_jax.spelling import nearest

POLICIES: dict[str, Callable[..., Policy]] = {
    "full": full,
    "recycled": recycled,
    "recycled-dynamic": recycled_dynamic,
    "streaming": streaming,
}


def make_policy(name: str, **knobs: object) -> Policy:
    """The policy registered as `name` with its knobs set.

    Raises ValueError for an unknown name or knob, with the nearest valid one, and for values a part refuses.
    """
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is unknown; {nearest(name, POLICIES)}")
    valid = inspect.signature(POLICIES[name]).parameters
    for knob in knobs:
        if knob not in valid:
            raise ValueError(f"policy.{knob} is not a knob of {name!r}; {nearest(knob, valid)}")
    return POLICIES[name](**knobs)
