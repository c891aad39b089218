"""Exact top-p at every step: the fewest slots that hold a given share of the attention."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import gather_attention, select_tokens, token_scores
from recycled_jax.frame import Attended, Scorer, Selecting, Selector
from recycled_jax.frame.method import selecting_trace
from recycled_jax.policies.policy import Policy


@dataclass(frozen=True)
class MassBefore(Scorer):
    """Minus the attention mass on the slots with more attention than this one, for the query head of the group where
    it is least: a slot is in the union of the heads' top p if its score is above -p."""

    def score(self, token, cache, state, here):
        rows = token_scores(token.q, cache, here.lengths, group_reduction="none", **here.to_op)
        needed = mass_before(rows).reshape(cache.batch, cache.kv_heads, -1, cache.capacity)
        return -jnp.min(needed, axis=2)


@dataclass(frozen=True)
class TopP(Selector):
    """Self and the slots that score above -`p`; where these are more than `k`, the best `k`: the union for a smaller p,
    cut among equals to the earlier slots. With `p` of 1 every slot counts, however the sums are rounded."""

    p: float
    k: int

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p} must be above 0 and at most 1")
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1: the current token is always read")

    @property
    def entries(self):
        return self.k

    def select(self, scores, lengths, *, implementation):
        best = select_tokens(scores, lengths, k=self.k, implementation=implementation)
        counts = self._counts(jnp.take_along_axis(scores, jnp.maximum(best, 0), axis=-1))
        present = best == lengths[:, None, None] - 1
        return jnp.where((best >= 0) & (counts | present), best, -1)

    def left_out(
        self, scores: Float[Array, "batch heads capacity"], lengths: Int[Array, " batch"]
    ) -> Int[Array, " batch"]:
        """How many slots do not fit into `k`, sum over heads."""
        past = jnp.arange(scores.shape[-1])[None, None, :] < lengths[:, None, None] - 1
        wanted = 1 + jnp.sum(past & self._counts(scores), axis=-1)
        return jnp.sum(jnp.maximum(wanted - self.k, 0), axis=-1)

    def _counts(self, scores: Float[Array, "batch heads slots"]) -> Bool[Array, "batch heads slots"]:
        return (scores > -self.p) | (self.p == 1)


@struct.dataclass
class CappedState:
    """The scorer's state, and what the cap has cost so far."""

    scorer: Any
    overflow: Int[Array, "layers batch"]  # slots left out, sum over steps and kv heads


@dataclass(frozen=True)
class CappedSelecting(Selecting):
    """`Selecting` by top p, with a count of the slots that the cap has left out."""

    selector: TopP

    def begin(self, prefilled, *, implementation):
        scorer = self.scorer.begin(prefilled, implementation=implementation)
        return CappedState(scorer, jnp.zeros((prefilled.cache.layers, prefilled.cache.batch), jnp.int32))

    def attend(self, role, token, cache, state, handed, here):
        assert cache is not None
        with jax.named_scope("attention/select"):
            scorer = self.scorer.append(state.scorer, token, here)
            scores = self.scorer.score(token, cache, scorer, here)
            positions = self.selector.select(scores, here.lengths, implementation=here.implementation)
            left_out = jnp.where(here.active, self.selector.left_out(scores, here.lengths), 0)
        with jax.named_scope("attention/selection"):
            output = gather_attention(token.q, cache, positions, **here.to_op)
        trace = selecting_trace(positions, self.scorer.reads(here.lengths, cache), here)
        return Attended(
            output, CappedState(scorer, state.overflow.at[here.layer].add(left_out)), positions, trace, positions
        )


def mass_before(rows: Float[Array, "batch heads capacity"]) -> Float[Array, "batch heads capacity"]:
    """Of each slot: the sum of the probabilities above its own, and of equal ones in earlier slots."""
    # No probability is negative, so the bits order them; integers sort in less than half the time (CPU).
    order = jnp.argsort(-lax.bitcast_convert_type(rows, jnp.int32), axis=-1, stable=True)
    sorted_rows = jnp.take_along_axis(rows, order, axis=-1)
    before = jnp.cumsum(jnp.pad(sorted_rows[..., :-1], ((0, 0), (0, 0), (1, 0))), axis=-1)
    return jnp.put_along_axis(rows, order, before, axis=-1, inplace=False)


def top_p(p: float = 0.9, k: int = 1024) -> Policy:
    """Exact top-p: every step scores the whole cache and attends the fewest slots that hold a share `p` of each query
    head's attention, the union over a kv head's, at most `k`; the state counts what does not fit. The reference of
    adaptive budgets (as the oracle in Tactic, arXiv 2502.12216; the cap is ours)."""
    return Policy("top-p", CappedSelecting(MassBefore(), TopP(p, k)))
