"""Recycling: a selection is copied into a compact buffer and attended for many steps, until the schedule refreshes it.

This is the heart of the library. The new token already stands in the full cache; the schedule says which rows
refresh; `lax.cond` reads the cache only if some row does. Layers that follow another take over its decisions and its
slots, and only copy their own keys and values.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KVCache, for_decoding, gather_selection, selection_attention
from recycled_jax.frame.layer_plan import EVERY_LAYER, LayerPlan, Role
from recycled_jax.frame.method import (
    Attended,
    Axes,
    Here,
    LayerTrace,
    Method,
    Token,
    in_words,
    layers_in_words,
    slots_held,
)
from recycled_jax.frame.prompt import LastQueries
from recycled_jax.frame.schedules import QueryCheck, Schedule
from recycled_jax.frame.scorers import Scorer
from recycled_jax.frame.selectors import TopK
from recycled_jax.layers import through

RefreshAttention = Literal["full", "selection"]
RowRule = Literal["per_row", "any", "all"]


@struct.dataclass
class Selection:
    """The slots that recycled steps read, copied once into a compact buffer.

    Entries stand in the order of eviction, weakest first; `positions` is -1 where an entry is empty, and empty ones
    come first. The newest token of every recycled step overwrites the next entry in that order.
    """

    positions: Int[Array, "layers batch kv_heads entries"]
    compact: KVCache  # its slots are the entries


@struct.dataclass
class RefreshMemory:
    """What schedules remember of each layer's last refresh."""

    query: Float[Array, "layers batch head_dim"]  # float32: mean over the heads of the query that made the selection
    steps_since: Int[Array, "layers batch"]  # recycled steps since then; 0 right after a refresh


@struct.dataclass
class RecyclingState:
    """What recycling carries from step to step."""

    selection: Selection
    memory: RefreshMemory
    scorer: Any


class Handed(NamedTuple):
    """What a layer hands to those that follow it."""

    positions: Int[Array, "batch kv_heads entries"]
    refreshing: Bool[Array, " batch"]


@dataclass(frozen=True)
class Recycling(Method):
    """How selections are made and when.

    `refresh`: what a refreshing step attends, the `full` cache (Recycled Attention, RefreshKV) or only the new
    `selection` (the paper's score-only ablation: values are not read). `rows`: whose wish decides in a batch.
    `per_row`: each row gets exactly what it gets alone, and scoring runs whenever some row wants it. `any`: all rows
    refresh when one wants, at the same cost; a row's result then depends on its neighbours. `all`: only when every
    row wants, the cheapest and stalest. `keep_cache` False, for schedules that never refresh: the full cache is
    dropped after prefill, and the compact buffer is all the memory that decoding needs.
    """

    scorer: Scorer
    selector: TopK
    schedule: Schedule
    refresh: RefreshAttention = "full"
    rows: RowRule = "per_row"
    layers: LayerPlan = EVERY_LAYER
    keep_cache: bool = True

    def __post_init__(self) -> None:
        if self.refresh not in get_args(RefreshAttention):
            raise ValueError(f"refresh={self.refresh!r} must be one of {', '.join(get_args(RefreshAttention))}")
        if self.rows not in get_args(RowRule):
            raise ValueError(f"rows={self.rows!r} must be one of {', '.join(get_args(RowRule))}")
        longest = self.schedule.longest_stride
        room = self.selector.entries - self.selector.sinks
        if longest is not None and longest > room:
            checked = isinstance(self.schedule, QueryCheck) and longest > self.schedule.stride
            name = "max_stride" if checked else "stride"
            raise ValueError(
                f"{name}={longest} is above k - sinks = {room}: the tokens between two refreshes would evict the whole "
                f"selection; raise k or lower {name}"
            )
        if isinstance(self.schedule, QueryCheck) and self.rows == "all" and self.schedule.max_stride is None:
            raise ValueError("rows='all' needs max_stride, without it one row could keep all others from refreshing")
        if not self.keep_cache and not self.schedule.never:
            raise ValueError("keep_cache=False needs a schedule that never refreshes: a refresh reads the full cache")

    @property
    def axes(self):
        when = in_words(self.schedule) + layers_in_words(self.layers)
        return Axes(in_words(self.scorer), in_words(self.selector), when)

    @property
    def rows_agree(self) -> bool:
        """Whether all active rows of a batch refresh together."""
        return self.schedule.rows_agree or self.rows != "per_row"

    @property
    def observers(self):
        return (LastQueries(1), *self.scorer.observers)

    @property
    def keeps_cache(self):
        return self.keep_cache

    @property
    def plan(self):
        return self.layers

    def begin(self, prefilled, *, implementation):
        cache, prompts = prefilled.cache, prefilled.prompts
        shape = (cache.layers, cache.batch, cache.kv_heads, self.selector.entries)
        nothing = Selection(jnp.full(shape, -1, jnp.int32), cache.empty_like(capacity=self.selector.entries))
        scorer = self.scorer.begin(prefilled, implementation=implementation)
        selection = self.select_all(
            nothing,
            cache,
            prompts.lengths,
            lambda here: self.scorer.score_prompt(prefilled, scorer, here),
            implementation=implementation,
        )
        window = prompts.seen(LastQueries(1))
        memory = RefreshMemory(
            query=self.mean_query(window.bare_q[..., -1, :], window.q[..., -1, :]),
            steps_since=jnp.zeros((cache.layers, cache.batch), jnp.int32),
        )
        selection = Selection(selection.positions, for_decoding(selection.compact))
        return RecyclingState(selection, memory, scorer)

    def select_all(
        self,
        selection: Selection,
        cache: KVCache,
        lengths: Int[Array, " batch"],
        score: Callable[[Here], Float[Array, "batch heads capacity"]],
        *,
        implementation: str | None,
    ) -> Selection:
        """A new selection in every layer and row, in the place of `selection`: by `score` in the layers that select,
        taken over from them in those that follow."""
        nowhere, active = jnp.zeros((), jnp.int32), jnp.ones(lengths.shape, bool)

        def select_in_layer(carry, layer, role: Role):
            selection, positions = carry
            here = Here(layer, lengths, nowhere, active, implementation=implementation)
            if role == "select":
                positions = self._select(score(here), here, cache.kv_heads)
            compact = gather_selection(cache, positions, selection.compact, **here.to_op)
            return (Selection(selection.positions.at[layer].set(positions), compact), positions), None

        carry = selection, jnp.full(selection.positions.shape[1:], -1, jnp.int32)
        for role, run in self.runs(cache.layers):
            if role != "dense":
                carry, _ = through(functools.partial(select_in_layer, role=role), carry, run, cache)
        return carry[0]

    def corrected(self, state, cache, *, implementation):
        positions = state.selection.positions

        def copy(compact: KVCache, layer: Int[Array, ""] | int) -> tuple[KVCache, None]:
            return gather_selection(cache, positions[layer], compact, layer=layer, implementation=implementation), None

        compact, _ = through(copy, state.selection.compact, range(cache.layers), cache)
        return RecyclingState(Selection(positions, compact), state.memory, state.scorer)

    def before_layers(self, state, cache):
        shape = state.selection.positions.shape[1:]
        return Handed(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape[0], bool))

    def attend(self, role, token, cache, state, handed, here):
        layer, memory = here.layer, state.memory
        query = self.mean_query(token.bare_q, token.q)
        since = memory.steps_since[layer]
        similarity = _cosine(query, memory.query[layer])
        scorer = state.scorer
        if role == "follow":
            requested = refreshing = handed.refreshing
        else:
            scorer = self.scorer.append(scorer, token, here)
            if here.kind == "scheduled":
                requested = self.schedule.wants(here.step, since, similarity) & here.active
                refreshing = _agree(self.rows, requested, here.active)
            else:
                requested = refreshing = here.active & (here.kind == "refresh")

        def reuse(selection: Selection):
            with jax.named_scope("attention/recycled"):
                attended, aged = self._reuse(token, selection, since, here)
                positions = aged.positions[layer]
                nothing = jnp.full(since.shape, jnp.nan)
                return attended, aged, nothing, slots_held(positions), jnp.zeros(since.shape)

        def refresh(selection: Selection):
            assert cache is not None  # whoever may refresh keeps it
            # What the rows that do not refresh get: when all that are active do, nothing is worth computing for them.
            if self.rows_agree:
                other_attended, other = jnp.zeros_like(token.q), selection
            else:
                other_attended, other = self._reuse(token, selection, since, here)
            with jax.named_scope("attention/refresh"):
                attended = None
                if role == "follow":
                    positions = handed.positions
                elif self.refresh == "full":
                    scores, attended = self.scorer.score_and_attend(token, cache, scorer, here)
                    positions = self._select(scores, here, cache.kv_heads)
                else:
                    positions = self._select(self.scorer.score(token, cache, scorer, here), here, cache.kv_heads)
                everything = attended is not None
                compact = gather_selection(cache, positions, other.compact, rows=refreshing, **here.to_op)
                if attended is None:
                    attended = selection_attention(token.q, compact, positions >= 0, **here.to_op)
                kept = _where_rows(refreshing, positions, other.positions[layer])
                overlap = selection_overlap(selection.positions[layer], positions, here.lengths - 1 - since)
                held = slots_held(kept)
                # copying a selection reads its keys and values
                scored = 2 * held
                if role != "follow" and not everything:
                    scored += self.scorer.reads(here.lengths, cache)
                attended_slots = here.lengths.astype(held.dtype) if everything else held
                return (
                    _where_rows(refreshing, attended, other_attended),
                    Selection(other.positions.at[layer].set(kept), compact),
                    jnp.where(refreshing, overlap, jnp.nan),
                    jnp.where(refreshing, attended_slots, held),
                    jnp.where(refreshing, scored, 0.0),
                )

        if self.schedule.never:
            done = reuse(state.selection)
        elif here.kind == "scheduled":
            done = lax.cond(jnp.any(refreshing), refresh, reuse, state.selection)
        else:
            done = (refresh if here.kind == "refresh" else reuse)(state.selection)
        attended, selection, overlap, attended_slots, scored = done

        memory = RefreshMemory(
            query=memory.query.at[layer].set(_where_rows(refreshing, query, memory.query[layer])),
            steps_since=memory.steps_since.at[layer].set(jnp.where(refreshing, 0, since + here.active)),
        )
        nothing = jnp.full(since.shape, jnp.nan)
        trace = LayerTrace(requested, refreshing, similarity, overlap, attended_slots, scored, nothing)
        positions = selection.positions[layer]
        return Attended(
            attended, RecyclingState(selection, memory, scorer), Handed(positions, refreshing), trace, positions
        )

    def _reuse(
        self, token: Token, selection: Selection, since: Int[Array, " batch"], here: Here
    ) -> tuple[Float[Array, "batch query_heads head_dim"], Selection]:
        """The present token overwrites the weakest entry; attention over the buffer."""
        entries = self.selector.entry_for(here.lengths - 1, since)
        entries = jnp.where(here.active, entries, self.selector.entries)  # past the end: the row writes nothing
        aged = Selection(
            _append_position(selection.positions, here.layer, entries, here.lengths - 1),
            selection.compact.append(here.layer, entries, token.k, token.v),
        )
        return selection_attention(token.q, aged.compact, aged.positions[here.layer] >= 0, **here.to_op), aged

    def _select(
        self, scores: Float[Array, "batch heads capacity"], here: Here, kv_heads: int
    ) -> Int[Array, "batch kv_heads entries"]:
        """A selection per kv head, the same for all where they share one: each has its own buffer."""
        positions = self.selector.select(scores, here.lengths, implementation=here.implementation)
        return jnp.broadcast_to(positions, (positions.shape[0], kv_heads, positions.shape[2]))

    def mean_query(
        self, bare_q: Float[Array, "*shape query_heads head_dim"], q: Float[Array, "*shape query_heads head_dim"]
    ) -> Float[Array, "*shape head_dim"]:
        """The query that schedules compare: mean over heads, float32."""
        chosen = bare_q if self.schedule.query_point == "before_rope" else q
        return jnp.mean(chosen.astype(jnp.float32), axis=-2)


def selection_overlap(
    old: Int[Array, "batch kv_heads budget"],
    new: Int[Array, "batch kv_heads budget"],
    lengths: Int[Array, " batch"],
) -> Float[Array, " batch"]:
    """Jaccard overlap |A ∩ B| / |A ∪ B| over the slots below `lengths` (those that existed when `old` was made), mean
    over kv heads; NaN where both are empty."""
    budget = old.shape[-1]

    def only_existing(positions, fill):
        exists = (positions >= 0) & (positions < lengths[:, None, None])
        # every dropped entry gets a value of its own, met nowhere else
        return jnp.where(exists, positions, -1 - fill - jnp.arange(budget)[None, None, :]), jnp.sum(exists, axis=-1)

    old, old_count = only_existing(old, 0)
    new, new_count = only_existing(new, budget)
    # each set has no duplicates, so equal neighbours in the sorted union are its intersection
    both = jnp.sort(jnp.concatenate([old, new], axis=-1), axis=-1)
    shared = jnp.sum(both[..., 1:] == both[..., :-1], axis=-1)
    return jnp.mean(shared / (old_count + new_count - shared), axis=-1)


def _agree(rule: RowRule, requested: Bool[Array, " batch"], active: Bool[Array, " batch"]) -> Bool[Array, " batch"]:
    if rule == "per_row":
        return requested
    if rule == "any":
        return jnp.any(requested) & active
    return jnp.all(requested | ~active) & active


def _append_position(stack, layer, entries, positions):
    rows = jnp.arange(positions.shape[0])
    return stack.at[layer, rows, :, entries].set(positions[:, None], mode="drop")


def _where_rows(rows: Bool[Array, " batch"], chosen: Array, other: Array) -> Array:
    return jnp.where(rows.reshape(rows.shape + (1,) * (chosen.ndim - 1)), chosen.astype(other.dtype), other)


def _cosine(a: Float[Array, "batch width"], b: Float[Array, "batch width"]) -> Float[Array, " batch"]:
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-30)
