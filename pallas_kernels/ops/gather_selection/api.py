"""Copying a selection out of the cache into a compact buffer."""

from functools import partial

import jax
from jaxtyping import Array, Bool, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import HeadMajor, KVCache, PerLayer
from pallas_kernels.checks import check_cache, check_positions, check_shape
from pallas_kernels.ops.gather_selection import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.gather_selection,
    "xla": xla.gather_selection,
    "pallas_tpu": pallas_tpu.gather_selection,
    "divided": xla.gather_selection,
}


def gather_selection(
    cache: KVCache,
    positions: Int[Array, "batch kv_heads budget"],
    into: KVCache,
    *,
    layer: int | Int[Array, ""] = 0,
    rows: Bool[Array, " batch"] | None = None,
    implementation: str | None = None,
) -> KVCache:
    """Writes the keys and values at `positions` of one layer, in that order, into the same layer of `into`.

    Args:
        cache: the full cache.
        positions: slots to copy, per kv head, in any order and with repeats; -1 is an empty entry.
        into: the compact buffer, a cache of as many slots as there are entries; donate it, it is updated in place.
        layer: which layer of both.
        rows: the rows of the batch to write; the others keep what they have. None: all.
        implementation: see the package.

    Returns:
        `into` with the layer written; empty entries of the written rows are zeros.

    Raises:
        ValueError: shapes do not fit, a position out of range (seen outside a trace only), unknown
            `implementation`.
    """
    check_cache(cache, layer)
    check_cache(into, layer, name="into")
    check_positions(positions, cache)
    wanted = _fitting(jax.eval_shape(partial(cache.empty_like, capacity=positions.shape[2])))
    given = _fitting(into)
    if given != wanted:
        names = "layout, layers, batch, kv_heads, capacity, head_dim, dtype"
        raise ValueError(f"into has ({names}) {_plain(given)}; expected {_plain(wanted)}, from cache and positions")
    if rows is not None:
        check_shape("rows", rows, (cache.batch,), "the batch of cache")
    return dispatch.run(
        "gather_selection", IMPLEMENTATIONS, implementation, cache, positions, into, layer=layer, rows=rows
    )


def _fitting(buffer: KVCache) -> tuple:
    """What has to agree: layers may stand apart in the cache and not in the buffer, which is smaller."""
    return (HeadMajor if isinstance(buffer, PerLayer) else type(buffer), *buffer.shape, buffer.dtype)


def _plain(parts: tuple) -> str:
    return f"({parts[0].__name__}, {', '.join(map(str, parts[1:]))})"
