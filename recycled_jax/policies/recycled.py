"""Recycled Attention and RefreshKV."""

from recycled_jax.frame import (
    AttentionScorer,
    FirstHeadScorer,
    FixedStride,
    GroupReduction,
    QueryCheck,
    QueryPoint,
    Recycling,
    RefreshAttention,
    RowRule,
    TopK,
)
from recycled_jax.policies.policy import Policy


def recycled(
    k: int = 1024,
    stride: int = 10,
    refresh: RefreshAttention = "full",
    pool: int = 7,
    group_reduction: GroupReduction = "max",
) -> Policy:
    """Recycled Attention / RefreshKV with a fixed stride: every `stride` steps all layers score the cache anew, the
    steps between read only the `k` slots selected then (Xu, Goyal, Choi, arXiv 2411.05787)."""
    return Policy("recycled", Recycling(AttentionScorer(group_reduction), TopK(k, pool), FixedStride(stride), refresh))


def recycled_v1(k: int = 4096, stride: int = 50, refresh: RefreshAttention = "full") -> Policy:
    """Recycled Attention as first published: `recycled` by the first query head of each kv head alone, without pooling
    (Xu, Goyal, Choi, arXiv 2411.05787v1)."""
    return Policy("recycled-v1", Recycling(FirstHeadScorer(), TopK(k), FixedStride(stride), refresh))


def recycled_dynamic(
    k: int = 1024,
    stride: int = 5,
    threshold: float = 0.85,
    max_stride: int | None = None,
    query_point: QueryPoint = "before_rope",
    refresh: RefreshAttention = "full",
    pool: int = 7,
    group_reduction: GroupReduction = "max",
    rows: RowRule = "per_row",
) -> Policy:
    """RefreshKV with query checks: every `stride` steps each layer by itself compares its head-averaged query with
    that of its last refresh and refreshes when the cosine is at most `threshold`, or after `max_stride` steps
    (default k - 1, or `stride` where that is more). The paper uses thresholds of 0.85 (Llama 3.1) and 0.95 (Qwen2)
    (Xu, Goyal, Choi, arXiv 2411.05787v2)."""
    # a stride above k - 1 stands, so that one above k is refused under its own name
    longest = max(stride, k - 1) if max_stride is None else max_stride
    return Policy(
        "recycled-dynamic",
        Recycling(
            AttentionScorer(group_reduction),
            TopK(k, pool),
            QueryCheck(stride, threshold, longest, query_point),
            refresh,
            rows,
        ),
    )
