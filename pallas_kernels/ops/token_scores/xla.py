"""token_scores in XLA: one batched product that reads k once, as it is stored."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops.one_query import reduce_group, softmax_weights


def token_scores(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    group_reduction: str,
) -> Float[Array, "batch heads capacity"]:
    visible = jnp.arange(cache.capacity)[None, None, :] < lengths[:, None, None]
    weights, total = softmax_weights(q, cache.keys(layer), visible, scale)
    return reduce_group(weights / total, group_reduction)
