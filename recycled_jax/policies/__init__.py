"""Policies: scorer × selector × schedule, under the names of the methods they make up."""

from recycled_jax.policies.policy import Policy, Recycling
from recycled_jax.policies.registry import POLICIES, make_policy
from recycled_jax.policies.schedules import FixedStride, Never, QueryCheck, Schedule
from recycled_jax.policies.scorers import AttentionScorer, RecencyScorer, Scorer
from recycled_jax.policies.selectors import TopK

__all__ = [
    "POLICIES",
    "AttentionScorer",
    "FixedStride",
    "Never",
    "Policy",
    "QueryCheck",
    "RecencyScorer",
    "Recycling",
    "Schedule",
    "Scorer",
    "TopK",
    "make_policy",
]
