"""SnapKV: the last tokens of the prompt choose once what decoding sees of it."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache, token_scores
from recycled_jax.frame import GroupReduction, Here, LastQueries, Never, Recycling, Scorer, TopK
from recycled_jax.frame.scorers import check_group_reduction
from recycled_jax.policies.policy import Policy

# `avg`: mean over the slots that there are. `avg_padded`: sum over the width, so that slots at the ends of the prompt
# score low, as in the released code.
Pooling = Literal["avg", "avg_padded", "max"]


@dataclass(frozen=True)
class WindowScorer(Scorer):
    """The probability that the last `window` queries give each slot, summed over them, then reduced over the query
    heads of a kv head; `pool` slots are averaged where `pooling` is not `max` (that is `TopK`'s), none of them in the
    window itself.

    The state is the window's queries, that of slot s in place s mod `window`: refreshes in later steps would score with
    the window of that step.
    """

    window: int = 32
    pool: int = 1
    pooling: Pooling = "avg"
    group_reduction: GroupReduction = "max"

    def __post_init__(self) -> None:
        check_group_reduction(self.group_reduction)
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 query")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling={self.pooling!r} must be one of {', '.join(get_args(Pooling))}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd and at least 1")

    @property
    def observers(self):
        return (LastQueries(self.window),)

    def begin(self, prefilled, *, implementation):
        queries = prefilled.prompts.seen(LastQueries(self.window)).q
        places = (jnp.arange(self.window)[None, :] - prefilled.prompts.lengths[:, None]) % self.window
        return jnp.take_along_axis(queries, places[None, :, None, :, None], axis=3)

    def append(self, state, token, here):
        place = jnp.where(here.active, (here.lengths - 1) % self.window, self.window)  # past the end: writes nothing
        return state.at[here.layer, jnp.arange(place.shape[0]), :, place].set(token.q, mode="drop")

    def score(self, token, cache, state, here):
        return self._score(cache, state, here)

    def score_prompt(self, prefilled, state, here):
        return self._score(prefilled.cache, state, here)

    def reads(self, lengths, cache):
        return self.window * lengths.astype(jnp.float32)

    def _score(self, cache: KVCache, state: Any, here: Here) -> Float[Array, "batch kv_heads capacity"]:
        queries = state[here.layer]

        def add(place, sums):
            # One query at a time: the probabilities of a whole window would be `window` times as large.
            age = (here.lengths - 1 - place) % self.window
            seen = jnp.maximum(here.lengths - age, 0)  # slots up to the query's own; none if the prompt is shorter
            return sums + token_scores(queries[:, :, place], cache, seen, group_reduction="none", **here.to_op)

        with jax.named_scope("attention/score"):
            batch, query_heads = queries.shape[:2]
            sums = lax.fori_loop(0, self.window, add, jnp.zeros((batch, query_heads, cache.capacity)))
            grouped = sums.reshape(batch, cache.kv_heads, -1, cache.capacity)
            scores = getattr(jnp, self.group_reduction)(grouped, axis=2)
            if self.pool == 1 or self.pooling == "max":
                return scores
            return average(scores, here.lengths - self.window, self.pool, padded=self.pooling == "avg_padded")


def average(
    scores: Float[Array, "batch heads slots"], lengths: Int[Array, " batch"], pool: int, *, padded: bool
) -> Float[Array, "batch heads slots"]:
    """The mean over `pool` slots around each, of those below `lengths`; `padded` counts the missing ones as zeros."""
    exists = jnp.arange(scores.shape[-1])[None, None, :] < lengths[:, None, None]

    def sums(values):
        return lax.reduce_window(values, 0.0, lax.add, (1, 1, pool), (1, 1, 1), "SAME")

    count = pool if padded else jnp.maximum(sums(exists.astype(scores.dtype)), 1.0)
    return sums(jnp.where(exists, scores, 0.0)) / count


def snapkv(
    k: int = 1024,
    window: int = 32,
    pool: int = 5,
    pooling: Pooling = "avg",
    tail: int = 256,
    group_reduction: GroupReduction = "max",
    keep_cache: bool = True,
) -> Policy:
    """SnapKV: the last `window` tokens of the prompt, and the slots they attend most, chosen once, `k` in all; `tail`
    generated tokens are read besides (the paper: all), more of them, or with `tail=0` all, evict the weakest.
    `keep_cache=False` drops the full cache (Li et al., arXiv 2404.14469)."""
    scorer = WindowScorer(window, pool, pooling, group_reduction)
    if window > k:
        raise ValueError(f"window={window} is above k={k}: the window is always kept")
    selector = TopK(k, pool=pool if pooling == "max" else 1, recent=window, tail=tail)
    return Policy("snapkv", Recycling(scorer, selector, Never(), keep_cache=keep_cache))
