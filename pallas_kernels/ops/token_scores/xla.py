"""token_scores in XLA: one product that reads k once, as it is stored."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops.cache_products import key_products
from pallas_kernels.ops.one_query import reduce_group, undivided_softmax


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
    weights, total = undivided_softmax(key_products(q, cache, layer, scale), visible)
    return reduce_group(weights / total, group_reduction)
