"""Things that users choose by name and set by knobs: a factory for each, whose parameters are the knobs."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from recycled_jax.spelling import nearest


def make[T](kind: str, factories: Mapping[str, Callable[..., T]], name: str, knobs: Mapping[str, Any]) -> T:
    """What the factory of that name makes with the knobs.

    Raises ValueError for an unknown name or knob, with the nearest valid one, and for values the factory refuses.
    """
    valid = knobs_of(kind, factories, name)
    for knob in knobs:
        if knob not in valid:
            raise ValueError(f"{kind}.{knob} is not a knob of {name!r}; {nearest(knob, valid)}")
    return factories[name](**knobs)


def knobs_of(kind: str, factories: Mapping[str, Callable], name: str) -> dict[str, tuple[Any, Any]]:
    """Type and default of each knob. Raises ValueError for an unknown name, with the nearest valid one."""
    if name not in factories:
        raise ValueError(f"{kind}={name!r} is unknown; {nearest(name, factories)}")
    hints = get_type_hints(factories[name])
    parameters = inspect.signature(factories[name]).parameters
    return {knob: (hints[knob], parameter.default) for knob, parameter in parameters.items()}
