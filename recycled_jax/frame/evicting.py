"""Evicting: a buffer of k entries is all that is left of the past, and every new token costs another its place.

Unlike a selection, what has gone cannot come back: which token goes is decided from what was attended, step by step.
H2O and TOVA are this with different rules.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import HeadMajor, selection_attention
from recycled_jax.frame.method import Attended, Axes, Here, LayerTrace, Method, in_words, slots_held
from recycled_jax.frame.prompt import LastQueries, Observer, Prefilled
from recycled_jax.frame.scorers import GroupReduction


class Eviction(ABC):
    """Which token goes when the buffer is full. Implementations are frozen dataclasses.

    A rule keeps a number for every token, its worth, and puts tokens into the order in which they stay.
    """

    @property
    def observers(self) -> tuple[Observer, ...]:
        """What has to be seen of the prompt, for `prompt_worth`."""
        return (LastQueries(1),)

    @property
    @abstractmethod
    def group_reduction(self) -> GroupReduction:
        """How a step's probabilities are reduced over the query heads of a kv head."""

    @abstractmethod
    def prompt_worth(self, prefilled: Prefilled, here: Here) -> Float[Array, "batch kv_heads capacity"]:
        """The worth of every slot after the prompt, float32; at and past a row's length it is never looked at."""

    @abstractmethod
    def update(
        self, worth: Float[Array, "batch kv_heads entries"], scores: Float[Array, "batch kv_heads entries"]
    ) -> Float[Array, "batch kv_heads entries"]:
        """The worth after a step that attended the entries with these probabilities; that of the present token was 0
        before."""

    @abstractmethod
    def rank(
        self,
        worth: Float[Array, "batch kv_heads entries"],
        positions: Int[Array, "batch kv_heads entries"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch kv_heads entries"]:
        """The lowest goes, among equals the latest; infinity for those that stay in any case. Entries that hold
        nothing (position -1, or not below the length) may get any number."""


@struct.dataclass
class EvictingState:
    """What is left of the past. Between two steps at least one entry of every kv head is free."""

    positions: Int[Array, "layers batch kv_heads entries"]  # the slot each would have in a full cache; -1 if free
    worth: Float[Array, "layers batch kv_heads entries"]  # the rule's, float32
    held: HeadMajor  # keys, rotated to their true positions, and values


@dataclass(frozen=True)
class Evicting(Method):
    """`k` tokens are attended per kv head: the present one and the k - 1 that are left; then one of them goes, by
    `rule`. The prompt is read densely and cut at its end. `keep_cache` True keeps the full cache nevertheless, to
    measure coverage by; no step attends it."""

    k: int
    rule: Eviction
    keep_cache: bool = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1: the current token is always read")

    @property
    def axes(self):
        return Axes("attention so far", f"all but one of k={self.k}, by {in_words(self.rule)}", "every-step")

    @property
    def observers(self):
        return self.rule.observers

    @property
    def keeps_cache(self):
        return self.keep_cache

    def begin(self, prefilled, *, implementation):
        cache, lengths = prefilled.cache, prefilled.prompts.lengths
        active, nowhere = jnp.ones(lengths.shape, bool), jnp.zeros((), jnp.int32)
        slots = jnp.arange(cache.capacity, dtype=jnp.int32)
        slots = jnp.broadcast_to(slots[None, None, :], (cache.batch, cache.kv_heads, cache.capacity))
        chosen = min(self.k - 1, cache.capacity)
        free = ((0, 0), (0, 0), (0, self.k - chosen))

        def cut(layer: Int[Array, ""] | int):
            here = Here(layer, lengths, nowhere, active, implementation=implementation)
            worth = self.rule.prompt_worth(prefilled, here)
            rank = self.rule.rank(worth, slots, lengths)
            rank = jnp.where(slots < lengths[:, None, None], rank, -jnp.inf)
            best, places = lax.top_k(rank, chosen)

            def gather(stored: Float[Array, "batch kv_heads capacity head_dim"]):
                found = jnp.take_along_axis(stored, places[..., None], axis=2)
                return jnp.pad(found, (*free, (0, 0)))

            positions = jnp.where(best > -jnp.inf, places, -1)
            return (
                jnp.pad(positions, free, constant_values=-1),
                jnp.pad(jnp.take_along_axis(worth, places, axis=2), free),
                gather(cache.keys(layer)),
                gather(cache.values(layer)),
            )

        with jax.named_scope("attention/evict"):
            positions, worth, k, v = lax.map(cut, jnp.arange(cache.layers))
        return EvictingState(positions, worth, HeadMajor(k, v))

    def attend(self, role, token, cache, state, handed, here):
        layer, positions, worth = here.layer, state.positions[here.layer], state.worth[here.layer]
        # Kv heads evict apart, so their free entries differ: one scatter of a token's heads into as many entries.
        free = jnp.argmax(positions < 0, axis=-1)
        at = _entries(layer, jnp.where(here.active[:, None], free, self.k))  # past the end: the row writes nothing
        held = HeadMajor(
            *(
                stack.at[at].set(new.astype(stack.dtype), mode="drop")
                for stack, new in ((state.held.k, token.k), (state.held.v, token.v))
            )
        )
        comes = (jnp.arange(self.k)[None, None, :] == free[..., None]) & here.active[:, None, None]
        positions = jnp.where(comes, here.lengths[:, None, None] - 1, positions)
        worth = jnp.where(comes, 0.0, worth)
        with jax.named_scope("attention/selection"):
            output, scores = selection_attention(
                token.q,
                held,
                positions >= 0,
                return_scores=True,
                group_reduction=self.rule.group_reduction,
                **here.to_op,
            )
        with jax.named_scope("attention/evict"):
            worth = jnp.where(here.active[:, None, None], self.rule.update(worth, scores), worth)
            goes = _weakest(self.rule.rank(worth, positions, here.lengths), positions)
            goes &= jnp.all(positions >= 0, axis=-1, keepdims=True) & here.active[:, None, None]
            left = jnp.where(goes, -1, positions)
        state = EvictingState(state.positions.at[layer].set(left), state.worth.at[layer].set(worth), held)
        return Attended(output, state, handed, _trace(positions), positions)


def _entries(layer: Int[Array, ""] | int, entries: Int[Array, "batch kv_heads"]):
    """Index of one entry per row and kv head in arrays of layers × batch × kv_heads × entries."""
    batch, kv_heads = entries.shape
    return layer, jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None, :], entries


def _weakest(
    rank: Float[Array, "batch kv_heads entries"], positions: Int[Array, "batch kv_heads entries"]
) -> Bool[Array, "batch kv_heads entries"]:
    """The entry of lowest rank in each head, among equals the latest token's."""
    lowest = rank == jnp.min(rank, axis=-1, keepdims=True)
    latest = jnp.argmax(jnp.where(lowest, positions, -1), axis=-1, keepdims=True)
    return jnp.arange(rank.shape[-1])[None, None, :] == latest


def _trace(positions: Int[Array, "batch kv_heads entries"]) -> LayerTrace:
    """The scores are those of the attention itself, so nothing else is read."""
    rows = positions.shape[:1]
    no, nothing = jnp.zeros(rows, bool), jnp.full(rows, jnp.nan)
    return LayerTrace(no, no, nothing, nothing, slots_held(positions), jnp.zeros(rows), nothing)
