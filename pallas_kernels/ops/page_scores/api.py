"""How strongly a query step could attend any token of a page, from two vectors that are kept of the page."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import KVCache
from pallas_kernels.checks import check_cache, check_group_reduction, check_query, check_shape, check_values
from pallas_kernels.ops.page_scores import pallas_tpu, reference, xla
from pallas_kernels.ops.page_scores.bounds import check_page_size

IMPLEMENTATIONS = {
    "reference": reference.page_scores,
    "xla": xla.page_scores,
    "pallas_tpu": pallas_tpu.page_scores,
}


def page_scores(
    q: Float[Array, "batch query_heads head_dim"],
    bounds: KVCache,
    lengths: Int[Array, " batch"],
    *,
    page_size: int,
    layer: int | Int[Array, ""] = 0,
    group_reduction: str = "max",
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch kv_heads pages"]:
    """An upper bound on the logits of each page's tokens, per query head, reduced over the query heads of a kv head.

    Per query head it is scale * sum over d of max(q_d min_d, q_d max_d), where min and max are over the keys of the
    page: no token of the page has a larger logit. Source: Quest (Tang et al. 2024, arXiv 2406.10774), with one score
    per query head; the reduction is ours.

    Args:
        q: the query of the present step.
        bounds: a cache with one slot per page, whose keys are the elementwise minima of the page's keys and whose
            values are their maxima (`page_bounds`, `update_page_bounds`). Those of pages not in use may be anything.
        lengths: tokens in use per row, 0 to pages * page_size, the present token included.
        page_size: tokens per page.
        layer: which layer of the bounds.
        group_reduction: `"max"`, `"mean"` or `"sum"` over the query heads of a kv head. With "max" the result bounds
            the logits of all of them.
        scale: positive factor on the logits; `head_dim ** -0.5` if None.
        implementation: see the package.

    Returns:
        Scores in float32. Pages from ceil(length / page_size) on are padding and have -inf.

    Raises:
        ValueError: shapes do not fit, `lengths` or `page_size` out of range, unknown `group_reduction` or
            `implementation`.
    """
    check_cache(bounds, layer, name="bounds")
    check_query(q, bounds, q_rank=3, name="bounds")
    check_page_size(page_size)
    check_shape("lengths", lengths, q.shape[:1], "the batch of q")
    check_values("lengths", lengths, 0, bounds.capacity * page_size)
    check_group_reduction(group_reduction)
    return dispatch.run(
        "page_scores",
        IMPLEMENTATIONS,
        implementation,
        q,
        bounds,
        lengths,
        page_size=page_size,
        layer=layer,
        group_reduction=group_reduction,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
