"""Scorers: how relevant is each slot of the cache to the present query?"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache, decode_attention, token_scores

GroupReduction = Literal["max", "mean", "sum"]


class Scorer(ABC):
    """Scores slots; the scores of slots at or past a row's length are never looked at."""

    @abstractmethod
    def score(
        self,
        q: Float[Array, "batch query_heads head_dim"],
        cache: KVCache,
        lengths: Int[Array, " batch"],
        *,
        layer: Int[Array, ""],
        implementation: str | None,
    ) -> Float[Array, "batch kv_heads capacity"]:
        """Float32, higher is more relevant."""

    def score_and_attend(
        self,
        q: Float[Array, "batch query_heads head_dim"],
        cache: KVCache,
        lengths: Int[Array, " batch"],
        *,
        layer: Int[Array, ""],
        implementation: str | None,
    ) -> tuple[Float[Array, "batch kv_heads capacity"], Float[Array, "batch query_heads head_dim"]]:
        """The scores, and attention over the whole cache; one pass over it where the scorer can share it."""
        scores = self.score(q, cache, lengths, layer=layer, implementation=implementation)
        return scores, decode_attention(q, cache, lengths, layer=layer, implementation=implementation)


@dataclass(frozen=True)
class AttentionScorer(Scorer):
    """The softmax probability of each slot, reduced over the query heads of a kv head.

    Probabilities and not logits, because the scales of logits differ between heads.
    """

    group_reduction: GroupReduction = "max"

    def __post_init__(self) -> None:
        if self.group_reduction not in get_args(GroupReduction):
            valid = ", ".join(get_args(GroupReduction))
            raise ValueError(f"group_reduction={self.group_reduction!r} must be one of {valid}")

    def score(self, q, cache, lengths, *, layer, implementation):
        return token_scores(
            q, cache, lengths, layer=layer, group_reduction=self.group_reduction, implementation=implementation
        )

    def score_and_attend(self, q, cache, lengths, *, layer, implementation):
        attended, scores = decode_attention(
            q,
            cache,
            lengths,
            layer=layer,
            return_scores=True,
            group_reduction=self.group_reduction,
            implementation=implementation,
        )
        return scores, attended


@dataclass(frozen=True)
class RecencyScorer(Scorer):
    """The later, the more relevant; reads nothing (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453)."""

    def score(self, q, cache, lengths, *, layer, implementation):
        # positions are exact in float32 up to 2^24 tokens
        recency = jnp.arange(cache.capacity, dtype=jnp.float32)
        return jnp.broadcast_to(recency[None, None, :], (cache.batch, cache.kv_heads, cache.capacity))
