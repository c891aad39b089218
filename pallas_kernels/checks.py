"""Validation shared by the operations: one sentence naming the argument, its value and what was expected.

Shapes and Python numbers are always checked. Values of integer arrays are checked only outside a trace, where
they are known; inside one, an index out of range is the caller's mistake and nothing reports it.
"""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

GROUP_REDUCTIONS = ("max", "mean", "sum")


def check_cache(k: jax.Array, v: jax.Array, *, names: tuple[str, str] = ("k", "v")) -> None:
    """k and v are [batch, kv_heads, slots, head_dim], both of one shape."""
    k_name, v_name = names
    if k.ndim != 4:
        raise ValueError(f"{k_name} has shape {k.shape}; expected [batch, kv_heads, slots, head_dim]")
    if k.shape != v.shape:
        raise ValueError(f"{k_name} has shape {k.shape} and {v_name} has shape {v.shape}; expected equal shapes")


def check_heads(q: jax.Array, k: jax.Array, v: jax.Array, *, q_rank: int, names: tuple[str, str] = ("k", "v")) -> None:
    """q is [batch, query_heads, (tokens,) head_dim] and fits the keys and values, which fit each other."""
    check_cache(k, v, names=names)
    k_name = names[0]
    if q.ndim != q_rank:
        raise ValueError(f"q has shape {q.shape}; expected {q_rank} dimensions")
    if (q.shape[0], q.shape[-1]) != (k.shape[0], k.shape[-1]):
        raise ValueError(
            f"q has shape {q.shape} and {k_name} has shape {k.shape}; expected equal batch (first) and head_dim (last)"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} query heads and {k_name} has {k.shape[1]} kv heads; "
            "expected a multiple of the kv heads"
        )


def check_shape(name: str, array: jax.Array, expected: tuple[int, ...], source: str) -> None:
    """`array` has the shape that follows from another argument, which `source` names."""
    if array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}; expected {expected}, from {source}")


def check_values(name: str, array: Any, lowest: int, highest: int) -> None:
    """Every entry of `array` lies in lowest..highest, as far as it is known: a traced array passes."""
    if isinstance(array, Tracer) or np.size(array) == 0:
        return
    # numpy, because an operation of jax on a known array is itself traced when a trace is under way.
    values = np.asarray(array)
    if values.min() < lowest or values.max() > highest:
        raise ValueError(f"{name} has values from {values.min()} to {values.max()}; expected {lowest} to {highest}")


def check_positions(positions: jax.Array, k: jax.Array) -> None:
    """`positions` is [batch, kv_heads, budget] for the cache k, with slots of it or -1."""
    if positions.ndim != 3 or positions.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"positions has shape {positions.shape} and k has shape {k.shape}; "
            "expected [batch, kv_heads, budget] with the batch and kv_heads of k"
        )
    check_values("positions", positions, -1, k.shape[2] - 1)


def check_group_reduction(group_reduction: str) -> None:
    if group_reduction not in GROUP_REDUCTIONS:
        raise ValueError(f"{group_reduction=} is not known; expected one of: {', '.join(GROUP_REDUCTIONS)}")
