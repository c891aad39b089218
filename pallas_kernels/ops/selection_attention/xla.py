"""selection_attention in XLA: dense attention over a few contiguous slots."""

from jaxtyping import Array, Bool, Float

from pallas_kernels.ops.one_query import softmax_weights, weighted_values


def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    k_sel: Float[Array, "batch kv_heads budget head_dim"],
    v_sel: Float[Array, "batch kv_heads budget head_dim"],
    valid: Bool[Array, "batch kv_heads budget"],
    *,
    scale: float,
) -> Float[Array, "batch query_heads head_dim"]:
    weights, total = softmax_weights(q, k_sel, valid, scale)
    return weighted_values(weights, total, v_sel).astype(q.dtype)
