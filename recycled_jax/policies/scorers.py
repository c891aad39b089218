"""Scorers: how relevant is each slot of the cache to the present query?"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import decode_attention, token_scores

GroupReduction = Literal["max", "mean", "sum"]


class Scorer(ABC):
    """Scores slots; the scores of slots at or past a row's length are never looked at."""

    @abstractmethod
    def score(
        self,
        q: Float[Array, "batch query_heads head_dim"],
        k: Float[Array, "batch kv_heads tokens head_dim"],
        lengths: Int[Array, " batch"],
        *,
        implementation: str | None,
    ) -> Float[Array, "batch kv_heads tokens"]:
        """Float32, higher is more relevant."""

    def score_and_attend(
        self,
        q: Float[Array, "batch query_heads head_dim"],
        k: Float[Array, "batch kv_heads tokens head_dim"],
        v: Float[Array, "batch kv_heads tokens head_dim"],
        lengths: Int[Array, " batch"],
        *,
        implementation: str | None,
    ) -> tuple[Float[Array, "batch kv_heads tokens"], Float[Array, "batch query_heads head_dim"]]:
        """The scores, and attention over the whole cache; one pass over it where the scorer can share it."""
        scores = self.score(q, k, lengths, implementation=implementation)
        return scores, decode_attention(q, k, v, lengths, implementation=implementation)


@dataclass(frozen=True)
class AttentionScorer(Scorer):
    """The softmax probability of each slot, reduced over the query heads of a kv head.

    Probabilities and not logits, because the scales of logits differ between heads (METHODS §1.3).
    """

    group_reduction: GroupReduction = "max"

    def __post_init__(self) -> None:
        if self.group_reduction not in get_args(GroupReduction):
            valid = ", ".join(get_args(GroupReduction))
            raise ValueError(f"group_reduction={self.group_reduction!r} must be one of {valid}")

    def score(self, q, k, lengths, *, implementation):
        return token_scores(q, k, lengths, group_reduction=self.group_reduction, implementation=implementation)

    def score_and_attend(self, q, k, v, lengths, *, implementation):
        attended, scores = decode_attention(
            q,
            k,
            v,
            lengths,
            return_scores=True,
            group_reduction=self.group_reduction,
            implementation=implementation,
        )
        return scores, attended


@dataclass(frozen=True)
class RecencyScorer(Scorer):
    """The later, the more relevant; reads nothing (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453)."""

    def score(self, q, k, lengths, *, implementation):
        # positions are exact in float32 up to 2^24 tokens
        return jnp.broadcast_to(jnp.arange(k.shape[2], dtype=jnp.float32)[None, None, :], k.shape[:3])
