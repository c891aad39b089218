"""The named policies. A factory's signature is its knobs, its docstring what `recycled policies` prints."""

import inspect
from collections.abc import Callable

from recycled_jax.policies.policy import Policy, Recycling, RefreshAttention, RowRule
from recycled_jax.policies.schedules import FixedStride, Never, QueryCheck, QueryPoint
from recycled_jax.policies.scorers import AttentionScorer, GroupReduction, RecencyScorer
from recycled_jax.policies.selectors import TopK
from recycled_jax.spelling import nearest


def full() -> Policy:
    """Dense attention: every step reads the whole cache. The ceiling of quality and the baseline of speed."""
    return Policy("full")


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
    (default k - 1, or `stride` where that is more). The paper uses thresholds of 0.85 (Llama 3.1) and 0.95 (Qwen2)."""
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


def streaming(k: int = 1024, sinks: int = 4) -> Policy:
    """StreamingLLM: the first `sinks` slots and the most recent ones, `k` in all, at their true positions; the prompt
    is read densely (Xiao et al., arXiv 2309.17453)."""
    return Policy("streaming", Recycling(RecencyScorer(), TopK(k, sinks=sinks), Never()))


POLICIES: dict[str, Callable[..., Policy]] = {
    "full": full,
    "recycled": recycled,
    "recycled-dynamic": recycled_dynamic,
    "streaming": streaming,
}


def make_policy(name: str, **knobs: object) -> Policy:
    """The policy registered as `name` with its knobs set.

    Raises ValueError for an unknown name or knob, with the nearest valid one, and for values a part refuses.
    """
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is unknown; {nearest(name, POLICIES)}")
    valid = inspect.signature(POLICIES[name]).parameters
    for knob in knobs:
        if knob not in valid:
            raise ValueError(f"policy.{knob} is not a knob of {name!r}; {nearest(knob, valid)}")
    return POLICIES[name](**knobs)
