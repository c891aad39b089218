"""H2O: heavy hitters, the tokens that have received most attention so far, and the newest."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from recycled_jax.frame.evicting import Evicting, Eviction
from recycled_jax.frame.prompt import Observer
from recycled_jax.frame.scorers import GroupReduction, check_group_reduction
from recycled_jax.policies.policy import Policy

# `original`: the sum of what a token has received, which favours old ones. `normalised`: its mean over the queries that
# could see the token.
Accumulation = Literal["original", "normalised"]
_BLOCK = 16  # queries whose probabilities exist at a time


@dataclass(frozen=True)
class ColumnSums(Observer):
    """The attention that every slot has received from all queries of the prompt: probabilities, reduced over the query
    heads of a kv head, then summed over the queries; `[layers, batch, kv_heads, capacity]` in float32.

    Fast attention does not tell its probabilities, so they are computed a second time, `_BLOCK` queries at once.
    """

    group_reduction: GroupReduction = "max"

    def start(self, config, *, batch, capacity, dtype):
        return jnp.zeros((config.layers, batch, config.kv_heads, capacity), jnp.float32)

    def observe(self, seen, chunk, cache):
        batch, _, queries, head_dim = chunk.q.shape
        block = math.gcd(queries, _BLOCK)
        keys = cache.keys(chunk.layer)  # once per chunk: a copy of the layer where the cache lies token by token
        slots = jnp.arange(cache.capacity)

        def add(index, sums):
            q = lax.dynamic_slice_in_dim(chunk.q, index * block, block, axis=2).astype(keys.dtype)
            grouped = q.reshape(batch, cache.kv_heads, -1, block, head_dim)
            logits = jnp.einsum("bngtd,bnsd->bngts", grouped, keys, preferred_element_type=jnp.float32)
            at = chunk.start + index * block + jnp.arange(block)
            visible = slots[None, :] <= at[:, None]
            logits = jnp.where(visible[None, None, None], head_dim**-0.5 * logits, -jnp.inf)
            received = getattr(jnp, self.group_reduction)(jax.nn.softmax(logits, axis=-1), axis=2)
            in_prompt = (at[None, :] < chunk.lengths[:, None])[:, None, :, None]
            return sums + jnp.sum(jnp.where(in_prompt, received, 0.0), axis=2)

        with jax.named_scope("attention/score"):
            sums = lax.fori_loop(0, queries // block, add, seen[chunk.layer])
        return seen.at[chunk.layer].set(sums)


@dataclass(frozen=True)
class HeavyHitters(Eviction):
    """The token that has received least attention goes, unless it is among the `recent` newest."""

    recent: int
    accumulation: Accumulation = "original"
    reduction: GroupReduction = "max"

    def __post_init__(self) -> None:
        check_group_reduction(self.reduction)
        if self.accumulation not in get_args(Accumulation):
            raise ValueError(f"accumulation={self.accumulation!r} must be one of {', '.join(get_args(Accumulation))}")

    @property
    def observers(self):
        return (ColumnSums(self.reduction),)

    @property
    def group_reduction(self):
        return self.reduction

    def prompt_worth(self, prefilled, here):
        return prefilled.prompts.seen(ColumnSums(self.reduction))[here.layer]

    def update(self, worth, scores):
        return worth + scores

    def rank(self, worth, positions, lengths):
        age = lengths[:, None, None] - positions  # queries that have seen the token, itself included
        received = worth if self.accumulation == "original" else worth / jnp.maximum(age, 1)
        return jnp.where(age <= self.recent, jnp.inf, received)


def h2o(
    k: int = 1024,
    recent: int | None = None,
    accumulation: Accumulation = "original",
    group_reduction: GroupReduction = "max",
    keep_cache: bool = True,
) -> Policy:
    """H2O: the `recent` newest tokens (default k / 2) and those that have received most attention so far stay, `k` with
    the present one; each step evicts one for good. `keep_cache=False` drops the full cache (Zhang et al.,
    arXiv 2306.14048)."""
    recent = k // 2 if recent is None else recent
    if not 0 <= recent < max(k, 1):
        raise ValueError(f"recent={recent} must be between 0 and k - 1 = {k - 1}: the present token takes an entry")
    return Policy("h2o", Evicting(k, HeavyHitters(recent, accumulation, group_reduction), keep_cache))
