"""Top-k of an earlier row: how much a selection loses by its age alone."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels import token_scores
from recycled_jax.frame import GroupReduction, LastQueries, Scorer, Selecting, TopK
from recycled_jax.frame.scorers import check_group_reduction
from recycled_jax.policies.policy import Policy


@dataclass(frozen=True)
class StaleAttentionScorer(Scorer):
    """The attention probabilities of the token `delay` steps ago, 0 for the tokens since. Its query, which may be one
    of the prompt, is kept and not its scores: with the keys of today it gives the same ones."""

    delay: int
    group_reduction: GroupReduction = "max"

    def __post_init__(self) -> None:
        check_group_reduction(self.group_reduction)

    @property
    def observers(self):
        return (LastQueries(self.delay + 1),)

    def begin(self, prefilled, *, implementation):
        return prefilled.prompts.seen(LastQueries(self.delay + 1)).q

    def append(self, state, token, here):
        queries = state[here.layer]  # [batch, query_heads, delay + 1, head_dim], oldest first
        newer = jnp.concatenate([queries[:, :, 1:], token.q[:, :, None].astype(queries.dtype)], axis=2)
        return state.at[here.layer].set(jnp.where(here.active[:, None, None, None], newer, queries))

    def score(self, token, cache, state, here):
        then = jnp.maximum(here.lengths - self.delay, 0)
        oldest = state[here.layer, :, :, 0]
        return token_scores(oldest, cache, then, group_reduction=self.group_reduction, **here.to_op)

    def reads(self, lengths, cache):
        return jnp.maximum(lengths - self.delay, 0).astype(jnp.float32)


def stale_top_k(k: int = 1024, delay: int = 1, pool: int = 1, group_reduction: GroupReduction = "max") -> Policy:
    """Stale top-k: what exact top-k would have kept `delay` steps ago, and the tokens since, `k` in all. Its mean over
    the delays of a stride tells what recycling over that stride can reach (ours)."""
    if k > 0 and not 0 <= delay < k:
        raise ValueError(f"delay={delay} must be between 0 and k - 1 = {k - 1}: the tokens since are always attended")
    return Policy(
        "stale-top-k", Selecting(StaleAttentionScorer(delay, group_reduction), TopK(k, pool, recent=delay + 1))
    )
