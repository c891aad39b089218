"""How much each slot of a ragged cache is attended by one query step: keys are read, values are not."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.checks import check_group_reduction, check_heads, check_shape, check_values
from pallas_kernels.ops.token_scores import reference, xla

IMPLEMENTATIONS = {
    "reference": reference.token_scores,
    "xla": xla.token_scores,
}


def token_scores(
    q: Float[Array, "batch query_heads head_dim"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    lengths: Int[Array, " batch"],
    *,
    scale: float | None = None,
    group_reduction: str = "max",
    implementation: str | None = None,
) -> Float[Array, "batch kv_heads tokens"]:
    """Softmax probability of every slot, per query head, reduced over the query heads of a kv head.

    Probabilities are aggregated rather than logits, because the scale of logits differs between heads.

    Args:
        q: the query of the present step.
        k: the keys of the full cache. Slots at `lengths` and beyond are padding and may hold anything.
        lengths: slots in use per row, 0 to tokens, the present token included.
        scale: factor on the logits; `head_dim ** -0.5` if None.
        group_reduction: `"max"`, `"mean"` or `"sum"` over the query heads of a kv head.
        implementation: see the package.

    Returns:
        Scores in float32, 0 in padding.

    Raises:
        ValueError: shapes do not fit, `lengths` out of range, unknown `group_reduction` or `implementation`.
    """
    check_heads(q, k, k, q_rank=3)
    check_shape("lengths", lengths, q.shape[:1], "the batch of q")
    check_values("lengths", lengths, 0, k.shape[2])
    check_group_reduction(group_reduction)
    return dispatch.run(
        "token_scores",
        IMPLEMENTATIONS,
        implementation,
        q,
        k,
        lengths,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        group_reduction=group_reduction,
    )
