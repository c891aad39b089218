"""decode_attention in XLA: two products that read k and v once each, as they are stored."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops.cache_products import key_products, value_sums
from pallas_kernels.ops.one_query import reduce_group, undivided_softmax


def decode_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool,
    group_reduction: str,
) -> tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch heads capacity"] | None]:
    visible = jnp.arange(cache.capacity)[None, None, :] < lengths[:, None, None]
    weights, total = undivided_softmax(key_products(q, cache, layer, scale), visible)
    out = (value_sums(weights, cache, layer) / total).reshape(q.shape).astype(q.dtype)
    return out, reduce_group(weights / total, group_reduction) if return_scores else None
