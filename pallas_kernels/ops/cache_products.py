"""The two products of one query step over a layer of a cache, each reading it as it is stored.

An int8 cache has a factor for every token. q k gets it afterwards, and the weights of v before; both are a head_dim
smaller than what is stored. Where XLA's products take int8 in, converted on the way, that is all. A CPU's take what
lies in memory, so there a layer goes through in blocks, which stay in the processor's cache.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.dispatch import platform
from pallas_kernels.int8_cache import Int8HeadMajor
from pallas_kernels.ops.one_query import products, weighted_sums

BLOCK_BYTES = 1 << 20  # of converted keys, or of values


def key_products(
    q: Float[Array, "batch query_heads head_dim"], cache: KVCache, layer: int | Int[Array, ""], scale: float
) -> Float[Array, "batch kv_heads group capacity"]:
    """scale q k, float32."""
    if not isinstance(cache, Int8HeadMajor):
        return products(q, cache.keys(layer), scale)

    def of(k, scales):
        return products(q, k.astype(cache.dtype), scale) * scales[:, :, None, :]

    if platform() != "cpu":
        return of(cache.k[layer], cache.k_scales[layer])

    def add_block(start, size, found):
        k, scales, _, _ = cache.stored_block(layer, start, size)
        return lax.dynamic_update_slice(found, of(k, scales), (0, 0, 0, start))

    group = q.shape[1] // cache.kv_heads
    return _over_blocks(cache, add_block, jnp.zeros((cache.batch, cache.kv_heads, group, cache.capacity), jnp.float32))


def value_sums(
    weights: Float[Array, "batch kv_heads group capacity"], cache: KVCache, layer: int | Int[Array, ""]
) -> Float[Array, "batch kv_heads group head_dim"]:
    """sum(weights v), float32."""
    if not isinstance(cache, Int8HeadMajor):
        return weighted_sums(weights, cache.values(layer))

    def of(weights, v, scales):
        return weighted_sums(weights * scales[:, :, None, :], v.astype(cache.dtype))

    if platform() != "cpu":
        return of(weights, cache.v[layer], cache.v_scales[layer])

    def add_block(start, size, sums):
        _, _, v, scales = cache.stored_block(layer, start, size)
        return sums + of(lax.dynamic_slice_in_dim(weights, start, size, axis=3), v, scales)

    return _over_blocks(cache, add_block, jnp.zeros((*weights.shape[:3], cache.head_dim), jnp.float32))


def _over_blocks(
    cache: KVCache,
    add_block: Callable[[int | Int[Array, ""], int, Float[Array, "..."]], Float[Array, "..."]],
    found: Float[Array, "..."],
) -> Float[Array, "..."]:
    """`add_block(start, size, found)` for all slots, block by block."""
    per_slot = cache.batch * cache.kv_heads * cache.head_dim * cache.dtype.itemsize
    size = min(max(BLOCK_BYTES // per_slot, 1), cache.capacity)
    found = lax.fori_loop(0, cache.capacity // size, lambda index, found: add_block(index * size, size, found), found)
    rest = cache.capacity % size
    return add_block(cache.capacity - rest, rest, found) if rest else found
