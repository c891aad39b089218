"""gather_attention in XLA: the selection is gathered into a temporary buffer and attended there."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops.gather_selection.xla import gather_positions
from pallas_kernels.ops.one_query import softmax_weights, weighted_values


def gather_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    positions: Int[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
) -> Float[Array, "batch query_heads head_dim"]:
    positions = jnp.broadcast_to(positions, (cache.batch, cache.kv_heads, positions.shape[2]))
    k, v = gather_positions(cache, layer, positions)
    weights, total = softmax_weights(q, k, positions >= 0, scale)
    return weighted_values(weights, total, v).astype(q.dtype)
