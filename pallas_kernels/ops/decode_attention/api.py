"""Attention of one query step over a ragged cache."""

from typing import Literal, overload

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import KVCache
from pallas_kernels.checks import check_cache, check_group_reduction, check_query, check_shape, check_values
from pallas_kernels.ops import on_divided
from pallas_kernels.ops.decode_attention import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.decode_attention,
    "xla": xla.decode_attention,
    "pallas_tpu": pallas_tpu.decode_attention,
    "divided": on_divided.decode_attention,
}


@overload
def decode_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_scores: Literal[False] = False,
    group_reduction: str = "max",
    implementation: str | None = None,
) -> Float[Array, "batch query_heads head_dim"]: ...


@overload
def decode_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_scores: Literal[True],
    group_reduction: str = "max",
    implementation: str | None = None,
) -> tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch heads capacity"]]: ...


def decode_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_scores: bool = False,
    group_reduction: str = "max",
    implementation: str | None = None,
) -> (
    Float[Array, "batch query_heads head_dim"]
    | tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch heads capacity"]]
):
    """Attend the first `lengths[b]` slots of row b's cache; on request, say how much each was attended.

    Args:
        q: the query of the present step.
        cache: the full cache. Slots at `lengths` and beyond are padding: their keys may hold anything, their
            values must be finite (they are multiplied by zero).
        lengths: slots in use per row, 0 to the capacity, the present token included.
        layer: which layer of the cache.
        scale: factor on the logits; `head_dim ** -0.5` if None.
        return_scores: also return the scores, at the cost of no further read of the cache.
        group_reduction: `"max"`, `"mean"` or `"sum"` of the probabilities over the query heads of a kv head, or
            `"none"`: then each query head has its own.
        implementation: see the package.

    Returns:
        The output in the dtype of q, zeros for a row of length 0. With `return_scores`, a pair of it and
        `token_scores(q, cache, lengths)`.

    Raises:
        ValueError: shapes do not fit, `lengths` out of range, unknown `group_reduction` or `implementation`.
    """
    check_cache(cache, layer)
    check_query(q, cache, q_rank=3)
    check_shape("lengths", lengths, q.shape[:1], "the batch of q")
    check_values("lengths", lengths, 0, cache.capacity)
    check_group_reduction(group_reduction, or_none=True)
    out, scores = dispatch.run(
        "decode_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        cache,
        lengths,
        layer=layer,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        return_scores=return_scores,
        group_reduction=group_reduction,
    )
    return (out, scores) if return_scores else out
