"""Selecting: a selection is made anew at every step, attended straight in the cache, perhaps shared by layers above.

Quest, DoubleSparse, TokenSelect and the like select in every layer; TidalDecode and LessIsMore in a few, and the layers
between take over what the nearest one below has found.
"""

from dataclasses import dataclass
from typing import get_args

import jax
import jax.numpy as jnp

from pallas_kernels import gather_attention
from recycled_jax.frame.layer_plan import EVERY_LAYER, LayerPlan
from recycled_jax.frame.method import Attended, Axes, LayerTrace, Method, in_words, layers_in_words, slots_held
from recycled_jax.frame.recycling import RefreshAttention
from recycled_jax.frame.scorers import Scorer
from recycled_jax.frame.selectors import Selector


@dataclass(frozen=True)
class Selecting(Method):
    """`attends`: what a layer that selects attends itself, its `selection` or the `full` cache (TidalDecode); layers
    that follow attend the selection."""

    scorer: Scorer
    selector: Selector
    layers: LayerPlan = EVERY_LAYER
    attends: RefreshAttention = "selection"

    def __post_init__(self) -> None:
        if self.attends not in get_args(RefreshAttention):
            raise ValueError(f"attends={self.attends!r} must be one of {', '.join(get_args(RefreshAttention))}")

    @property
    def axes(self):
        return Axes(in_words(self.scorer), in_words(self.selector), "every-step" + layers_in_words(self.layers))

    @property
    def observers(self):
        return self.scorer.observers

    @property
    def plan(self):
        return self.layers

    def begin(self, prefilled, *, implementation):
        return self.scorer.begin(prefilled, implementation=implementation)

    def before_layers(self, state, cache):
        assert cache is not None
        return jnp.full((cache.batch, self.selector.heads(cache.kv_heads), self.selector.entries), -1, jnp.int32)

    def attend(self, role, token, cache, state, handed, here):
        assert cache is not None
        selects, output = role == "select", None
        positions = handed
        if selects:
            with jax.named_scope("attention/select"):
                state = self.scorer.append(state, token, here)
                if self.attends == "full":
                    scores, output = self.scorer.score_and_attend(token, cache, state, here)
                else:
                    scores = self.scorer.score(token, cache, state, here)
                positions = self.selector.select(scores, here.lengths, implementation=here.implementation)
        if output is None:
            with jax.named_scope("attention/selection"):
                output = gather_attention(token.q, cache, positions, **here.to_op)
        nothing = jnp.full(here.lengths.shape, jnp.nan)
        everything = selects and self.attends == "full"
        scored = jnp.zeros(here.lengths.shape)
        if selects:
            # attending everything reads the keys that scoring needs, too
            scored = self.scorer.reads(here.lengths, cache) * (0.0 if everything else 1.0)
        trace = LayerTrace(
            requested=here.active & selects,
            refreshed=here.active & selects,
            similarity=nothing,
            overlap=nothing,
            attended=here.lengths.astype(jnp.float32) if everything else slots_held(positions),
            scored=scored,
            coverage=nothing,
        )
        return Attended(output, state, positions, trace, positions)
