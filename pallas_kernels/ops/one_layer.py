"""The two products of a decode query with one layer of the cache, in XLA.

Where XLA makes no product of a slice in place (CPU), the layer would be copied out of the stack first, which moves
three times the bytes: read, write, read again. There the slots are read in blocks instead, whose copies stay in the
processor's cache, and no block behind the longest row is read at all.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.dispatch import platform
from pallas_kernels.ops.one_query import products, weighted_sums

# Measured on two cores, four layers, float32: 32,768 slots of 3 kv heads took 35 to 40 ms in blocks of 0.8 to 3 MB,
# 98 ms in blocks of 0.1 MB, 90 ms as whole layers; 10 rows of 4,096 slots of 2 kv heads took 20 to 25 ms in blocks of
# 1.3 to 5 MB, 59 ms as whole layers.
BLOCK_BYTES = 1 << 20
FEWEST_SLOTS = 32  # of a block, however many rows there are


def layer_logits(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
) -> Float[Array, "batch kv_heads group capacity"]:
    """scale q k, float32; what stands behind a row's length means nothing."""
    block = _block_slots(cache)
    if block == cache.capacity:
        return products(q, cache.keys(layer), scale)

    def add(index, logits):
        start = jnp.minimum(index * block, cache.capacity - block)  # the last one may lap over the one before
        k, _ = cache.block(layer, start, block)
        return lax.dynamic_update_slice_in_dim(logits, products(q, k, scale), start, axis=3)

    logits = jnp.zeros((cache.batch, cache.kv_heads, q.shape[1] // cache.kv_heads, cache.capacity), jnp.float32)
    return lax.fori_loop(0, _blocks_in_use(lengths, block), add, logits)


def layer_values(
    weights: Float[Array, "batch kv_heads group capacity"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
) -> Float[Array, "batch kv_heads group head_dim"]:
    """sum(weights v), float32; `weights` are 0 behind the lengths."""
    block = _block_slots(cache)
    if block == cache.capacity:
        return weighted_sums(weights, cache.values(layer))

    def add(index, sums):
        start = jnp.minimum(index * block, cache.capacity - block)
        _, v = cache.block(layer, start, block)
        new = start + jnp.arange(block) >= index * block  # counted once where blocks lap over
        ours = jnp.where(new, lax.dynamic_slice_in_dim(weights, start, block, axis=3), 0.0)
        return sums + weighted_sums(ours, v)

    sums = jnp.zeros((*weights.shape[:3], cache.head_dim), jnp.float32)
    return lax.fori_loop(0, _blocks_in_use(lengths, block), add, sums)


def _block_slots(cache: KVCache) -> int:
    """The slots of a block: all of them where the layer is small or need not be copied."""
    of_slot = cache.batch * cache.kv_heads * cache.head_dim * cache.dtype.itemsize
    slots = max(BLOCK_BYTES // of_slot, FEWEST_SLOTS)
    return slots if platform() == "cpu" and slots < cache.capacity else cache.capacity


def _blocks_in_use(lengths: Int[Array, " batch"], block: int) -> Int[Array, ""]:
    return (jnp.max(lengths) + block - 1) // block
