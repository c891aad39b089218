"""Between granularities: scores of pages for selectors of slots, scores of slots for selectors of pages."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from recycled_jax.frame import Scorer


@dataclass(frozen=True)
class _Wrapped(Scorer):
    """A scorer whose scores are changed; its state and what it asks for stay as they are."""

    scorer: Scorer
    page: int

    @property
    def observers(self):
        return self.scorer.observers

    def begin(self, prefilled, *, implementation):
        return self.scorer.begin(prefilled, implementation=implementation)

    def append(self, state, token, here):
        return self.scorer.append(state, token, here)

    def reads(self, lengths, cache):
        return self.scorer.reads(lengths, cache)


@dataclass(frozen=True)
class SlotsOfPages(_Wrapped):
    """Every slot has the score of its page of `page` slots (ours). Among a page's slots the earlier win."""

    def score(self, token, cache, state, here):
        return self._spread(self.scorer.score(token, cache, state, here), cache.capacity)

    def score_prompt(self, prefilled, state, here):
        return self._spread(self.scorer.score_prompt(prefilled, state, here), prefilled.cache.capacity)

    def _spread(self, scores: Float[Array, "batch heads pages"], capacity: int) -> Float[Array, "batch heads slots"]:
        # -inf is a page's mark for being out of use; selectors of slots know that by the length, and want numbers
        finite = jnp.maximum(scores, jnp.finfo(scores.dtype).min)
        return jnp.repeat(finite, self.page, axis=-1)[..., :capacity]


@dataclass(frozen=True)
class PagesOfSlots(_Wrapped):
    """Every page of `page` slots has the score of its best slot (ours)."""

    @property
    def unit(self):
        return self.page

    def score(self, token, cache, state, here):
        return self._best(self.scorer.score(token, cache, state, here), here)

    def score_prompt(self, prefilled, state, here):
        return self._best(self.scorer.score_prompt(prefilled, state, here), here)

    def _best(self, scores: Float[Array, "batch heads slots"], here) -> Float[Array, "batch heads pages"]:
        slots = scores.shape[-1]
        lowest = jnp.finfo(scores.dtype).min
        in_use = jnp.arange(slots)[None, None, :] < here.lengths[:, None, None]
        padded = jnp.pad(
            jnp.where(in_use, scores, lowest), ((0, 0), (0, 0), (0, -slots % self.page)), constant_values=lowest
        )
        return jnp.max(padded.reshape(*padded.shape[:2], -1, self.page), axis=-1)
