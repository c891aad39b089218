"""Attention of a few query steps at the end of a ragged cache, as draft tokens are verified by."""

from typing import Literal, overload

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import KVCache
from pallas_kernels.checks import check_cache, check_group_reduction, check_query, check_shape, check_values
from pallas_kernels.ops import on_divided
from pallas_kernels.ops.verify_attention import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.verify_attention,
    "xla": xla.verify_attention,
    "pallas_tpu": pallas_tpu.verify_attention,
    "divided": on_divided.verify_attention,
}


@overload
def verify_attention(
    q: Float[Array, "batch query_heads steps head_dim"],
    cache: KVCache,
    start: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_scores: Literal[False] = False,
    group_reduction: str = "max",
    implementation: str | None = None,
) -> Float[Array, "batch query_heads steps head_dim"]: ...


@overload
def verify_attention(
    q: Float[Array, "batch query_heads steps head_dim"],
    cache: KVCache,
    start: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_scores: Literal[True],
    group_reduction: str = "max",
    implementation: str | None = None,
) -> tuple[Float[Array, "batch query_heads steps head_dim"], Float[Array, "batch steps heads capacity"]]: ...


def verify_attention(
    q: Float[Array, "batch query_heads steps head_dim"],
    cache: KVCache,
    start: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    return_scores: bool = False,
    group_reduction: str = "max",
    implementation: str | None = None,
) -> (
    Float[Array, "batch query_heads steps head_dim"]
    | tuple[Float[Array, "batch query_heads steps head_dim"], Float[Array, "batch steps heads capacity"]]
):
    """Causal attention of consecutive query steps, each as `decode_attention` has it, in one pass over the cache.

    The keys and values of all the steps are already in the cache. Step t of row b attends slots 0 to `start[b] + t`:
    what it gives is `decode_attention(q[:, :, t], cache, start + t + 1)`, but every slot is read once for all steps.

    Args:
        q: the queries of the steps, a few per row.
        cache: the full cache. Slots from `start + steps` on are padding: their keys may hold anything, their values
            must be finite (they are multiplied by zero).
        start: slot of the first step per row, 0 to the capacity. Where the cache has no slot for a step, as for an idle
            row that stands at its end, the step attends all slots that there are.
        layer: which layer of the cache.
        scale: factor on the logits; `head_dim ** -0.5` if None.
        return_scores: also return the scores of every step, at the cost of no further read of the cache.
        group_reduction: `"max"`, `"mean"` or `"sum"` of the probabilities over the query heads of a kv head, or
            `"none"`: then each query head has its own.
        implementation: see the package.

    Returns:
        The output, in shape and dtype like q. With `return_scores`, a pair of it and the scores, float32: those of step
        t are `token_scores(q[:, :, t], cache, start + t + 1)`, 0 in slots that the step does not attend.

    Raises:
        ValueError: shapes do not fit, `start` out of range, unknown `group_reduction` or `implementation`.
    """
    check_cache(cache, layer)
    check_query(q, cache, q_rank=4)
    steps = q.shape[2]
    if not 1 <= steps <= cache.capacity:
        raise ValueError(f"q has {steps} steps and cache has {cache.capacity} slots; expected 1 to as many steps")
    check_shape("start", start, q.shape[:1], "the batch of q")
    check_values("start", start, 0, cache.capacity)
    check_group_reduction(group_reduction, or_none=True)
    out, scores = dispatch.run(
        "verify_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        cache,
        start,
        layer=layer,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        return_scores=return_scores,
        group_reduction=group_reduction,
    )
    # Implementations have heads second, as a mesh divides arrays, and users the steps, of which they take one.
    return (out, scores.swapaxes(1, 2)) if return_scores else out
