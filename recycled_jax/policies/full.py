"""The dense policy."""

from recycled_jax.policies.policy import Policy


def full() -> Policy:
    """Dense attention: every step reads the whole cache. The ceiling of quality and the baseline of speed."""
    return Policy("full")
