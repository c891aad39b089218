"""What page_scores reads: the smallest and the largest key of every page, elementwise, as a cache of pages.

A cache with one slot per page holds them, minima as its keys and maxima as its values, so that it lies in memory as the
cache of tokens does and is 2 / page_size of the bytes of its keys.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import HeadMajor, KVCache, TokenMajor
from pallas_kernels.checks import check_cache, check_shape, check_values

# The bounds of a layer are made a piece at a time, so that what it takes beside them does not grow with the cache.
TOKENS_AT_ONCE = 1024


def page_bounds(
    cache: KVCache,
    lengths: Int[Array, " batch"],
    into: KVCache,
    *,
    layer: int | Int[Array, ""],
    page_size: int,
) -> KVCache:
    """Writes the bounds of one layer of a filled cache into the same layer of `into`: after a prompt.

    Args:
        cache: the full cache, of which the keys are read. Slots at `lengths` and beyond may hold anything.
        lengths: slots in use per row, 0 to the capacity.
        into: bounds, a cache of ceil(capacity / page_size) slots, in either layout; donate it.
        layer: which layer of both.
        page_size: tokens per page.

    Returns:
        `into` with the layer written; pages with no token are zeros.

    Raises:
        ValueError: shapes do not fit, `lengths` or `page_size` out of range.
    """
    check_cache(cache, layer)
    check_cache(into, layer, name="into")
    check_page_size(page_size)
    check_shape("lengths", lengths, (cache.batch,), "the batch of cache")
    check_values("lengths", lengths, 0, cache.capacity)
    wanted = (cache.layers, cache.batch, cache.kv_heads, -(-cache.capacity // page_size), cache.head_dim, cache.dtype)
    given = (into.layers, into.batch, into.kv_heads, into.capacity, into.head_dim, into.dtype)
    if given != wanted:
        names = "layers, batch, kv_heads, capacity, head_dim, dtype"
        raise ValueError(f"into has ({names}) {_plain(given)}; expected {_plain(wanted)}, from cache and {page_size=}")

    at_once = max(TOKENS_AT_ONCE // page_size, 1)  # pages
    whole = cache.capacity // (at_once * page_size)

    def write(first: int | Int[Array, ""], tokens: int, bounds: KVCache) -> KVCache:
        start = first * page_size
        keys, _ = cache.block(layer, start, tokens)
        return bounds.write(layer, first, *_extremes(keys, lengths - start, page_size))

    if whole:
        into = lax.fori_loop(0, whole, lambda i, bounds: write(i * at_once, at_once * page_size, bounds), into)
    rest = cache.capacity - whole * at_once * page_size
    return write(whole * at_once, rest, into) if rest else into


def _extremes(
    keys: Float[Array, "batch kv_heads tokens head_dim"], lengths: Int[Array, " batch"], page_size: int
) -> tuple[Float[Array, "batch kv_heads pages head_dim"], Float[Array, "batch kv_heads pages head_dim"]]:
    """Minima and maxima of each page of keys, of which the first `lengths` are in use, perhaps none; the last page may
    be cut short."""
    batch, kv_heads, tokens, head_dim = keys.shape
    pages = -(-tokens // page_size)
    keys = jnp.pad(keys, ((0, 0), (0, 0), (0, pages * page_size - tokens), (0, 0)))
    keys = keys.reshape(batch, kv_heads, pages, page_size, head_dim)
    slots = jnp.arange(pages * page_size).reshape(pages, page_size)
    in_use = (slots[None] < lengths[:, None, None])[:, None, :, :, None]
    has_tokens = in_use[:, :, :, 0]
    minima = jnp.min(jnp.where(in_use, keys, jnp.inf), axis=3)
    maxima = jnp.max(jnp.where(in_use, keys, -jnp.inf), axis=3)
    return jnp.where(has_tokens, minima, 0), jnp.where(has_tokens, maxima, 0)


def update_page_bounds(
    bounds: KVCache,
    slots: Int[Array, " batch"],
    k: Float[Array, "batch kv_heads head_dim"],
    *,
    layer: int | Int[Array, ""],
    page_size: int,
) -> KVCache:
    """The bounds of one layer after a token per row was appended to the cache: one page per row is read and written.

    The first token of a page sets its bounds, so what a page held before it was in use never matters.

    Args:
        bounds: the bounds so far; donate them.
        slots: the slot of the cache that each row's token went to. One past the last page changes nothing.
        k: the keys of the tokens.
        layer: which layer.
        page_size: tokens per page.

    Raises:
        ValueError: shapes do not fit or `page_size` out of range.
    """
    check_cache(bounds, layer, name="bounds")
    check_page_size(page_size)
    check_shape("slots", slots, (bounds.batch,), "the batch of bounds")
    check_shape("k", k, (bounds.batch, bounds.kv_heads, bounds.head_dim), "bounds")
    k = k.astype(bounds.dtype)
    pages = slots // page_size
    lowest, highest = _slot_of_each_row(bounds, layer, pages)
    first = (slots % page_size == 0)[:, None, None]
    lowest, highest = jnp.where(first, k, jnp.minimum(lowest, k)), jnp.where(first, k, jnp.maximum(highest, k))
    return bounds.append(layer, pages, lowest, highest)


def check_page_size(page_size: int) -> None:
    if page_size < 1:
        raise ValueError(f"{page_size=} is not a number of tokens; expected 1 or more")


def _slot_of_each_row(
    bounds: KVCache, layer: int | Int[Array, ""], slots: Int[Array, " batch"]
) -> tuple[Float[Array, "batch kv_heads head_dim"], Float[Array, "batch kv_heads head_dim"]]:
    """Straight from the stack: through `bounds.keys` XLA may rewrite the whole layer for one slot of it."""
    rows = jnp.arange(bounds.batch)
    if isinstance(bounds, HeadMajor):
        return bounds.k[layer, rows, :, slots], bounds.v[layer, rows, :, slots]
    assert isinstance(bounds, TokenMajor)
    pair = bounds.kv[layer, rows, slots].reshape(bounds.batch, 2, bounds.kv_heads, bounds.head_dim)
    return pair[:, 0], pair[:, 1]


def _plain(parts: tuple) -> str:
    return f"({', '.join(map(str, parts))})"
