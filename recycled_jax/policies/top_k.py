"""Exact top-k at every step: the upper bound of all policies with a budget of k."""

from recycled_jax.frame import AttentionScorer, GroupReduction, Selecting, TopK
from recycled_jax.policies.policy import Policy


def top_k(k: int = 1024, pool: int = 1, group_reduction: GroupReduction = "max") -> Policy:
    """Exact top-k: every step scores the whole cache by its own attention and attends the `k` best slots of each kv
    head. It saves no reading of keys; it bounds what any selection of `k` slots can do (ours, a common reference)."""
    return Policy("top-k", Selecting(AttentionScorer(group_reduction), TopK(k, pool)))
