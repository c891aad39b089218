"""Attention of one query step over a compact buffer."""

from typing import Literal, overload

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import KVCache
from pallas_kernels.checks import check_cache, check_group_reduction, check_query
from pallas_kernels.ops.selection_attention import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.selection_attention,
    "xla": xla.selection_attention,
    "pallas_tpu": pallas_tpu.selection_attention,
}


@overload
def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    selection: KVCache,
    valid: Bool[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_scores: Literal[False] = False,
    group_reduction: str = "max",
    implementation: str | None = None,
) -> Float[Array, "batch query_heads head_dim"]: ...


@overload
def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    selection: KVCache,
    valid: Bool[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_scores: Literal[True],
    group_reduction: str = "max",
    implementation: str | None = None,
) -> tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch score_heads budget"]]: ...


def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    selection: KVCache,
    valid: Bool[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_scores: bool = False,
    group_reduction: str = "max",
    implementation: str | None = None,
) -> (
    Float[Array, "batch query_heads head_dim"]
    | tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch score_heads budget"]]
):
    """Attend the valid entries of a selection; their order does not matter.

    Args:
        q: the query of the present step.
        selection: the compact buffer, with a slot per entry. Entries that are not valid may hold any key and any
            finite value.
        valid: which entries hold a token, per kv head, or one row for all of them.
        layer: which layer of the selection.
        scale: factor on the logits; `head_dim ** -0.5` if None.
        return_scores: also return how much each entry was attended. Not by "pallas_tpu".
        group_reduction: `"max"`, `"mean"` or `"sum"` of the probabilities over the query heads of a kv head, or
            `"none"`: then each query head has its own.
        implementation: see the package.

    Returns:
        The output in the dtype of q; zeros for the query heads of a kv head without a valid entry. With
        `return_scores`, a pair of it and the scores in float32, 0 in entries that are not valid.

    Raises:
        ValueError: shapes do not fit, unknown `group_reduction` or `implementation`.
    """
    check_cache(selection, layer, name="selection")
    check_query(q, selection, q_rank=3, name="selection")
    expected = (selection.batch, selection.kv_heads, selection.capacity)
    if valid.shape not in (expected, (expected[0], 1, expected[2])):
        raise ValueError(f"valid has shape {valid.shape}; expected {expected}, from selection, or one head for all")
    check_group_reduction(group_reduction, or_none=True)
    out, scores = dispatch.run(
        "selection_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        selection,
        valid,
        layer=layer,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        return_scores=return_scores,
        group_reduction=group_reduction,
    )
    return (out, scores) if return_scores else out
