"""Policies: points of the frame, under the names of the methods they make up."""

from recycled_jax.policies.policy import Policy
from recycled_jax.policies.registry import POLICIES, make_policy

__all__ = ["POLICIES", "Policy", "make_policy"]
