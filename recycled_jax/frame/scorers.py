"""Scorers: how relevant is each slot of the cache to the present query?"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache, decode_attention, token_scores
from recycled_jax.frame.method import Here, Token
from recycled_jax.frame.prompt import LastQueries, Observer, Prefilled

GroupReduction = Literal["max", "mean", "sum"]


class Scorer(ABC):
    """Scores slots, or pages of slots. Implementations are frozen dataclasses; what they keep from step to step (bounds
    of pages, labels, clusters) is a state of their own: a pytree whose arrays begin with the axis of layers."""

    @property
    def unit(self) -> int:
        """Slots that share a score: those of a page, or 1."""
        return 1

    @property
    def observers(self) -> tuple[Observer, ...]:
        """What has to be seen of the prompt, for `begin` and `score_prompt`."""
        return (LastQueries(1),)

    def begin(self, prefilled: Prefilled, *, implementation: str | None) -> Any:
        """The state after prefill, of all layers."""
        del prefilled, implementation
        return ()

    def append(self, state: Any, token: Token, here: Here) -> Any:
        """The state after the present token's key was written to slot `here.lengths - 1` of active rows."""
        del token, here
        return state

    @abstractmethod
    def score(self, token: Token, cache: KVCache, state: Any, here: Here) -> Float[Array, "batch heads capacity"]:
        """Float32, higher is more relevant; what stands at or past a row's length is never looked at.

        `heads` are the kv heads, unless the scorer is for selectors that want a score of every query head.
        """

    def score_and_attend(
        self, token: Token, cache: KVCache, state: Any, here: Here
    ) -> tuple[Float[Array, "batch heads capacity"], Float[Array, "batch query_heads head_dim"]]:
        """The scores, and attention over the whole cache; one pass over it where the scorer can share it."""
        scores = self.score(token, cache, state, here)
        return scores, decode_attention(token.q, cache, here.lengths, **here.to_op)

    def score_prompt(self, prefilled: Prefilled, state: Any, here: Here) -> Float[Array, "batch heads capacity"]:
        """The scores that make a first selection, before any decode step; `here.lengths` are those of the prompts."""
        window = prefilled.prompts.seen(LastQueries(1))
        bare_q, q = (queries[here.layer, :, :, -1] for queries in (window.bare_q, window.q))
        nothing = jnp.zeros((q.shape[0], prefilled.cache.kv_heads, q.shape[-1]), q.dtype)
        return self.score(Token(bare_q, q, nothing, nothing), prefilled.cache, state, here)

    def reads(self, lengths: Int[Array, " batch"], cache: KVCache) -> Float[Array, " batch"]:
        """What `score` reads, per kv head, in slots of keys of the cache; by default every key."""
        return lengths.astype(jnp.float32)


@dataclass(frozen=True)
class AttentionScorer(Scorer):
    """The softmax probability of each slot, reduced over the query heads of a kv head.

    Probabilities and not logits, because the scales of logits differ between heads.
    """

    group_reduction: GroupReduction = "max"

    def __post_init__(self) -> None:
        check_group_reduction(self.group_reduction)

    def score(self, token, cache, state, here):
        return token_scores(token.q, cache, here.lengths, group_reduction=self.group_reduction, **here.to_op)

    def score_and_attend(self, token, cache, state, here):
        attended, scores = decode_attention(
            token.q, cache, here.lengths, return_scores=True, group_reduction=self.group_reduction, **here.to_op
        )
        return scores, attended


@dataclass(frozen=True)
class FirstHeadScorer(Scorer):
    """The softmax probability that the first query head of each kv head gives a slot; the others are not asked
    (Recycled Attention, arXiv 2411.05787v1)."""

    def score(self, token, cache, state, here):
        first = token.q[:, :: token.q.shape[1] // cache.kv_heads]
        return token_scores(first, cache, here.lengths, **here.to_op)


@dataclass(frozen=True)
class RecencyScorer(Scorer):
    """The later, the more relevant; reads nothing (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453)."""

    def score(self, token, cache, state, here):
        # positions are exact in float32 up to 2^24 tokens
        recency = jnp.arange(cache.capacity, dtype=jnp.float32)
        return jnp.broadcast_to(recency[None, None, :], (cache.batch, cache.kv_heads, cache.capacity))

    def reads(self, lengths, cache):
        return jnp.zeros(lengths.shape)


def check_group_reduction(group_reduction: str) -> None:
    """Raises ValueError for one that is not known."""
    if group_reduction not in get_args(GroupReduction):
        raise ValueError(f"group_reduction={group_reduction!r} must be one of {', '.join(get_args(GroupReduction))}")
