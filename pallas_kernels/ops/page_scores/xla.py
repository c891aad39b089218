"""page_scores in XLA: the positive part of q meets the maxima, the negative part the minima."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops.one_query import reduce_group


def page_scores(
    q: Float[Array, "batch query_heads head_dim"],
    bounds: KVCache,
    lengths: Int[Array, " batch"],
    *,
    page_size: int,
    layer: int | Int[Array, ""],
    group_reduction: str,
    scale: float,
) -> Float[Array, "batch kv_heads pages"]:
    # q takes the dtype of the bounds, never the reverse: casting them would write a copy.
    grouped = q.astype(bounds.dtype).reshape(bounds.batch, bounds.kv_heads, -1, bounds.head_dim)

    # Two products, each over a stack as it lies; joined into one of twice the width, the bounds would be copied.
    def product(part, extremes):
        return jnp.einsum("bngd,bnpd->bngp", part, extremes, preferred_element_type=jnp.float32)

    logits = product(jnp.maximum(grouped, 0), bounds.values(layer))
    logits = scale * (logits + product(jnp.minimum(grouped, 0), bounds.keys(layer)))
    in_use = page_size * jnp.arange(bounds.capacity)[None, :] < lengths[:, None]
    return jnp.where(in_use[:, None, :], reduce_group(logits, group_reduction), -jnp.inf)
