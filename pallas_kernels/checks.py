"""Validation shared by the operations: one sentence naming the argument, its value and what was expected.

Shapes and Python numbers are always checked. Values of integer arrays are checked only outside a trace, where
they are known; inside one, an index out of range is the caller's mistake and nothing reports it.
"""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from pallas_kernels.cache import HeadMajor, KVCache, PerLayer, TokenMajor
from pallas_kernels.divided import Divided
from pallas_kernels.int8_cache import Int8HeadMajor

GROUP_REDUCTIONS = ("max", "mean", "sum")
PER_QUERY_HEAD = "none"  # no reduction


def check_cache(cache: Any, layer: int | Int[Array, ""], *, name: str = "cache") -> None:
    """The arrays of a cache fit each other and it has the layer."""
    if isinstance(cache, Divided):
        return check_cache(cache.whole, layer, name=name)
    if isinstance(cache, PerLayer):
        if not isinstance(layer, int):
            kind = type(layer).__name__
            raise ValueError(f"layer is a {kind}; expected an int, which names a layer of a PerLayer {name}")
        if len(cache.k) != len(cache.v) or not cache.k:
            raise ValueError(f"{name} has {len(cache.k)} layers of keys and {len(cache.v)} of values; expected as many")
        kinds = sorted({f"{x.dtype}{list(x.shape)}" for x in (*cache.k, *cache.v)})
        if len(kinds) != 1 or cache.k[0].ndim != 4:
            raise ValueError(
                f"{name} has layers of {', '.join(kinds)}; expected one shape, [batch, kv_heads, capacity, head_dim]"
            )
    elif isinstance(cache, HeadMajor):
        if cache.k.ndim != 5:
            raise ValueError(
                f"{name}.k has shape {cache.k.shape}; expected [layers, batch, kv_heads, capacity, head_dim]"
            )
        if cache.k.dtype != cache.v.dtype:
            raise ValueError(f"{name}.k is {cache.k.dtype} and {name}.v is {cache.v.dtype}; expected one dtype")
        if cache.k.shape != cache.v.shape:
            raise ValueError(
                f"{name}.k has shape {cache.k.shape} and {name}.v has shape {cache.v.shape}; expected equal shapes"
            )
    elif isinstance(cache, Int8HeadMajor):
        kinds = [f"{x.dtype}{list(x.shape)}" for x in (cache.k, cache.v, cache.k_scales, cache.v_scales)]
        if cache.k.ndim != 5 or kinds != [f"int8{list(cache.k.shape)}"] * 2 + [f"float32{list(cache.k.shape[:4])}"] * 2:
            raise ValueError(
                f"{name} has k, v and their scales of {', '.join(kinds)}; expected int8 of one shape, [layers, batch, "
                "kv_heads, capacity, head_dim], and float32 of the same without head_dim"
            )
    elif isinstance(cache, TokenMajor):
        shape = cache.kv.shape
        if len(shape) != 6 or shape[3] != 2 or shape[5] % cache.pack:
            raise ValueError(
                f"{name}.kv has shape {shape}; expected [layers, batch, capacity, 2, rows, lanes] with lanes a "
                f"multiple of pack={cache.pack}"
            )
    else:
        raise ValueError(f"{name} is a {type(cache).__name__}; expected a KVCache")
    check_values("layer", layer, 0, cache.layers - 1)


def check_query(q: jax.Array, cache: KVCache, *, q_rank: int, name: str = "cache") -> None:
    """q is [batch, query_heads, (tokens,) head_dim] and fits the cache."""
    if q.ndim != q_rank:
        raise ValueError(f"q has shape {q.shape}; expected {q_rank} dimensions")
    if (q.shape[0], q.shape[-1]) != (cache.batch, cache.head_dim):
        raise ValueError(
            f"q has shape {q.shape} and {name} has batch {cache.batch} and head_dim {cache.head_dim}; "
            "expected equal batch (first) and head_dim (last)"
        )
    _check_group(q.shape[1], cache.kv_heads, name)


def check_sequences(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """q is [batch, query_heads, tokens, head_dim] and fits k and v, which fit each other."""
    for name, array in (("q", q), ("k", k)):
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}; expected 4 dimensions")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {k.shape} and v has shape {v.shape}; expected equal shapes")
    if (q.shape[0], q.shape[-1]) != (k.shape[0], k.shape[-1]):
        raise ValueError(
            f"q has shape {q.shape} and k has shape {k.shape}; expected equal batch (first) and head_dim (last)"
        )
    _check_group(q.shape[1], k.shape[1], "k")


def _check_group(query_heads: int, kv_heads: int, name: str) -> None:
    if query_heads % kv_heads:
        raise ValueError(
            f"q has {query_heads} query heads and {name} has {kv_heads} kv heads; expected a multiple of the kv heads"
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


def check_positions(positions: jax.Array, cache: KVCache, *, shared: bool = False) -> None:
    """`positions` is [batch, kv_heads, budget] for the cache, with slots of it or -1; one head for all if `shared`."""
    allowed = (cache.kv_heads, 1) if shared else (cache.kv_heads,)
    if positions.ndim != 3 or positions.shape[0] != cache.batch or positions.shape[1] not in allowed:
        raise ValueError(
            f"positions has shape {positions.shape} and cache has batch {cache.batch} and {cache.kv_heads} kv heads; "
            f"expected [batch, kv_heads{' or 1' if shared else ''}, budget]"
        )
    if not positions.shape[2]:
        raise ValueError(f"positions has shape {positions.shape}; expected a budget of 1 or more entries")
    check_values("positions", positions, -1, cache.capacity - 1)


def check_group_reduction(group_reduction: str, *, or_none: bool = False) -> None:
    known = (*GROUP_REDUCTIONS, PER_QUERY_HEAD) if or_none else GROUP_REDUCTIONS
    if group_reduction not in known:
        raise ValueError(f"{group_reduction=} is not known; expected one of: {', '.join(known)}")
