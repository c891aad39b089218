"""verify_attention in XLA: two products that read k and v once each, as they are stored, for all steps."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.checks import PER_QUERY_HEAD
from pallas_kernels.ops.cache_products import key_products, value_sums
from pallas_kernels.ops.one_query import undivided_softmax


def verify_attention(
    q: Float[Array, "batch query_heads steps head_dim"],
    cache: KVCache,
    start: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool,
    group_reduction: str,
    first_slot: int | Int[Array, ""] = 0,
    parts: str | None = None,
) -> tuple[Float[Array, "batch query_heads steps head_dim"], Float[Array, "batch heads steps capacity"] | None]:
    """`cache` may be one of the `parts` of a mesh axis, whose slot 0 is `first_slot` of the whole."""
    batch, query_heads, steps, head_dim = q.shape
    # To the products all steps of all query heads of a kv head are one group; each query has a mask of its own.
    queries = query_heads * steps
    products = key_products(q.reshape(batch, queries, head_dim), cache, layer, scale)
    own_slot = jnp.tile(start[:, None] - first_slot + jnp.arange(steps)[None, :], (1, query_heads))
    visible = jnp.arange(cache.capacity)[None, None, :] <= own_slot[:, :, None]
    weights, total = undivided_softmax(products.reshape(batch, queries, 1, cache.capacity), visible, parts)
    sums = value_sums(weights.reshape(products.shape), cache, layer)
    sums = sums if parts is None else lax.psum(sums, parts)
    out = (sums.reshape(batch, queries, 1, head_dim) / total).reshape(q.shape).astype(q.dtype)
    if not return_scores:
        return out, None
    probabilities = (weights / total).reshape(batch, cache.kv_heads, -1, steps, cache.capacity)
    if group_reduction == PER_QUERY_HEAD:
        return out, probabilities.reshape(batch, query_heads, steps, cache.capacity)
    return out, getattr(jnp, group_reduction)(probabilities, axis=2)
