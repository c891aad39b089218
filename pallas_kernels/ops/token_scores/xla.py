"""token_scores in XLA: one batched product that reads k once, as it is stored."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ops.one_query import reduce_group, softmax_weights


def token_scores(
    q: Float[Array, "batch query_heads head_dim"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    lengths: Int[Array, " batch"],
    *,
    scale: float,
    group_reduction: str,
) -> Float[Array, "batch kv_heads tokens"]:
    visible = jnp.arange(k.shape[2])[None, None, :] < lengths[:, None, None]
    weights, total = softmax_weights(q, k, visible, scale)
    return reduce_group(weights / total, group_reduction)
