"""selection_attention in XLA: dense attention over a few contiguous slots."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops.cache_products import key_products, value_sums
from pallas_kernels.ops.one_query import reduce_group, undivided_softmax


def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    selection: KVCache,
    valid: Bool[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool = False,
    group_reduction: str = "max",
) -> tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch score_heads budget"] | None]:
    weights, total = undivided_softmax(key_products(q, selection, layer, scale), valid)
    out = (value_sums(weights, selection, layer) / total).reshape(q.shape).astype(q.dtype)
    return out, reduce_group(weights / total, group_reduction) if return_scores else None
