"""How much each slot of a ragged cache is attended by one query step: keys are read, values are not."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import KVCache
from pallas_kernels.checks import check_cache, check_group_reduction, check_query, check_shape, check_values
from pallas_kernels.ops import on_divided
from pallas_kernels.ops.token_scores import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.token_scores,
    "xla": xla.token_scores,
    "pallas_tpu": pallas_tpu.token_scores,
    "divided": on_divided.token_scores,
}


def token_scores(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    group_reduction: str = "max",
    implementation: str | None = None,
) -> Float[Array, "batch heads capacity"]:
    """Softmax probability of every slot, per query head, reduced over the query heads of a kv head.

    Probabilities are aggregated rather than logits, because the scale of logits differs between heads.

    Args:
        q: the query of the present step.
        cache: the full cache, of which the keys are read. Slots at `lengths` and beyond are padding and may hold
            anything.
        lengths: slots in use per row, 0 to the capacity, the present token included.
        layer: which layer of the cache.
        scale: factor on the logits; `head_dim ** -0.5` if None.
        group_reduction: `"max"`, `"mean"` or `"sum"` over the query heads of a kv head, or `"none"`.
        implementation: see the package.

    Returns:
        Scores in float32, 0 in padding. `heads` is kv_heads, or query_heads with `"none"`.

    Raises:
        ValueError: shapes do not fit, `lengths` out of range, unknown `group_reduction` or `implementation`.
    """
    check_cache(cache, layer)
    check_query(q, cache, q_rank=3)
    check_shape("lengths", lengths, q.shape[:1], "the batch of q")
    check_values("lengths", lengths, 0, cache.capacity)
    check_group_reduction(group_reduction, or_none=True)
    return dispatch.run(
        "token_scores",
        IMPLEMENTATIONS,
        implementation,
        q,
        cache,
        lengths,
        layer=layer,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        group_reduction=group_reduction,
    )
