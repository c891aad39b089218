"""Recycling over steps and over layers: RefreshKV × TidalDecode."""

from recycled_jax.frame import (
    AttentionScorer,
    FixedStride,
    GroupReduction,
    LayerPlan,
    QueryCheck,
    QueryPoint,
    Recycling,
    RefreshAttention,
    RowRule,
    TopK,
)
from recycled_jax.frame.selectors import Shared
from recycled_jax.policies.less_is_more import QueryHeadScorer, recent_window
from recycled_jax.policies.policy import Policy


def recycled_tidal(
    k: int = 1024,
    stride: int = 10,
    threshold: float | None = None,
    max_stride: int | None = None,
    dense_layers: tuple[int, ...] = (0, 1),
    selection_layers: tuple[int, ...] = (2, 13),
    refresh: RefreshAttention = "full",
    shared: Shared | None = "union",
    group_reduction: GroupReduction | None = None,
    pool: int = 1,
    recent_ratio: float = 0.25,
    sinks: int = 4,
    query_point: QueryPoint = "before_rope",
    rows: RowRule = "per_row",
    correct_every: int | None = None,
) -> Policy:
    """Recycling over steps and over layers: every `stride` steps the `selection_layers` score the cache anew, the
    layers above each take over its slots, and all read only those until the next refresh (ours: `recycled` ×
    `tidal`). With a `threshold`, selection layers check their queries as in `recycled-dynamic`. One selection for all
    heads, by LessIsMore's union over the query heads; `shared` and `group_reduction` choose otherwise. Slots are
    evicted by score first, then the recent window, the sinks never."""
    if group_reduction is None and shared != "union":
        raise ValueError(
            f"shared={shared!r} needs a group_reduction (max, mean or sum): without one, query heads score by "
            "themselves, and only shared='union' takes that"
        )
    scorer = QueryHeadScorer() if group_reduction is None else AttentionScorer(group_reduction)
    selector = TopK(k, pool, sinks, recent_window(k, recent_ratio, sinks), shared=shared)
    if threshold is None:
        if max_stride is not None:
            raise ValueError(f"max_stride={max_stride} needs a threshold: without one, the stride is fixed")
        schedule = FixedStride(stride)
    else:
        longest = max(stride, k - sinks - 1) if max_stride is None else max_stride
        schedule = QueryCheck(stride, threshold, longest, query_point)
    layers = LayerPlan(tuple(dense_layers), tuple(selection_layers))
    method = Recycling(scorer, selector, schedule, refresh, rows, layers)
    return Policy("recycled-tidal", method, correct_every=correct_every)
