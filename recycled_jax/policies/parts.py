"""The parts that policies can be composed of, by name: what `composed` understands in YAML."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from recycled_jax.frame import (
    AttentionScorer,
    FirstHeadScorer,
    FixedStride,
    LayerPlan,
    Never,
    QueryCheck,
    RecencyScorer,
    Schedule,
    Scorer,
    Selector,
    TopK,
    TopPages,
)
from recycled_jax.policies.int8_keys import Int8Scorer
from recycled_jax.policies.less_is_more import QueryHeadScorer
from recycled_jax.policies.quest import PageBoundScorer
from recycled_jax.policies.random_slots import RandomScorer
from recycled_jax.policies.snapkv import WindowScorer
from recycled_jax.spelling import nearest


def every_step() -> None:
    """A selection made anew at every step, and attended straight in the cache."""


SCORERS: dict[str, Callable[..., Scorer]] = {
    "attention": AttentionScorer,
    "first-head": FirstHeadScorer,
    "query-heads": QueryHeadScorer,
    "window": WindowScorer,
    "int8": Int8Scorer,
    "page-bounds": PageBoundScorer,
    "recency": RecencyScorer,
    "random": RandomScorer,
}
SELECTORS: dict[str, Callable[..., Selector]] = {"top-k": TopK, "top-pages": TopPages}
SCHEDULES: dict[str, Callable[..., Schedule | None]] = {
    "every-step": every_step,
    "fixed": FixedStride,
    "query-check": QueryCheck,
    "never": Never,
}


def make_part(axis: str, parts: Mapping[str, Callable], choice: Mapping[str, Any]) -> Any:
    """The part that `choice` describes: `{"name": "top-k", "k": 1024, "pool": 7}`.

    Raises ValueError, naming the axis, for an unknown name or field, with the nearest valid one, for a field that is
    missing, and for values the part refuses.
    """
    if "name" not in choice:
        raise ValueError(f"policy.{axis} is {dict(choice)}; expected a name among {', '.join(parts)}")
    name, fields = choice["name"], {field: value for field, value in choice.items() if field != "name"}
    if name not in parts:
        raise ValueError(f"policy.{axis}.name={name!r} is unknown; {nearest(name, parts)}")
    known = inspect.signature(parts[name]).parameters
    for field in fields:
        if field not in known:
            expected = nearest(field, known) if known else "it has no fields"
            raise ValueError(f"policy.{axis}.{field} is not a field of {name!r}; {expected}")
    for field, parameter in known.items():
        if parameter.default is parameter.empty and field not in fields:
            raise ValueError(f"policy.{axis}.{field} is missing; {name!r} has no default for it")
    return parts[name](**{field: _hashable(value) for field, value in fields.items()})


def make_layers(choice: Mapping[str, Any]) -> LayerPlan:
    """`{"dense": [0, 1], "select": [2, 13]}`, either of them or none."""
    for field in choice:
        if field not in ("dense", "select"):
            raise ValueError(f"policy.layers.{field} is not known; {nearest(field, ('dense', 'select'))}")
    return LayerPlan(**{field: _hashable(value) for field, value in choice.items()})


def _hashable(value: Any) -> Any:
    """YAML's lists as the tuples that frozen parts hold."""
    return tuple(value) if isinstance(value, list) else value
