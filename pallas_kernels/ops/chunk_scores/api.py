"""How well one query step fits each chunk of the past, of which one vector per kv head is kept."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.checks import check_group_reduction, check_shape, check_values
from pallas_kernels.ops.chunk_scores import pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.chunk_scores,
    "xla": xla.chunk_scores,
    "pallas_tpu": pallas_tpu.chunk_scores,
}


def chunk_scores(
    q: Float[Array, "batch query_heads head_dim"],
    chunks: Float[Array, "batch kv_heads chunks head_dim"],
    counts: Int[Array, " batch"],
    *,
    group_reduction: str = "max",
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch kv_heads chunks"]:
    """Scaled product of the query with the vector that represents each chunk, reduced over a kv head's query heads.

    What the vector is, is the caller's: LongHeads (arXiv 2402.10685) makes it by attention within the chunk, InfLLM
    (arXiv 2402.04617) is the mean of a few keys. LongHeads has one per query head and no scale (`scale=1.0`); one per
    kv head is ours.

    Args:
        q: the query of the present step.
        chunks: one vector per chunk. Those at `counts` and beyond are padding and may hold anything.
        counts: chunks in use per row, 0 to chunks.
        group_reduction: `"max"`, `"mean"` or `"sum"` over the query heads of a kv head.
        scale: factor on the products; `head_dim ** -0.5` if None.
        implementation: see the package.

    Returns:
        Scores in float32, -inf in padding.

    Raises:
        ValueError: shapes do not fit, `counts` out of range, unknown `group_reduction` or `implementation`.
    """
    if q.ndim != 3:
        raise ValueError(f"q has shape {q.shape}; expected 3 dimensions")
    if chunks.ndim != 4:
        raise ValueError(f"chunks has shape {chunks.shape}; expected [batch, kv_heads, chunks, head_dim]")
    if (q.shape[0], q.shape[-1]) != (chunks.shape[0], chunks.shape[-1]):
        raise ValueError(
            f"q has shape {q.shape} and chunks has shape {chunks.shape}; "
            "expected equal batch (first) and head_dim (last)"
        )
    if q.shape[1] % chunks.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} query heads and chunks has {chunks.shape[1]} kv heads; "
            "expected a multiple of the kv heads"
        )
    check_shape("counts", counts, q.shape[:1], "the batch of q")
    check_values("counts", counts, 0, chunks.shape[2])
    check_group_reduction(group_reduction)
    return dispatch.run(
        "chunk_scores",
        IMPLEMENTATIONS,
        implementation,
        q,
        chunks,
        counts,
        group_reduction=group_reduction,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
