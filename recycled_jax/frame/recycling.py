"""One layer's attention in one decode step under a recycling policy: refresh the selection, or reuse it.

This is the heart of the library. The new token already stands in the full cache; the schedule says which rows
refresh; `lax.cond` reads the cache only if some row does.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KVCache, gather_selection, selection_attention, token_scores
from recycled_jax.policies import Recycling
from recycled_jax.policies.policy import RowRule
from recycled_jax.state import RefreshMemory, Selection

# `scheduled`: the policy's schedule decides, by `lax.cond`. The other two leave no conditional in the program: for
# loops that know the phase of a fixed stride themselves.
StepKind = Literal["scheduled", "refresh", "recycled"]


class LayerInput(NamedTuple):
    """The present token, as one layer sees it; `bare_q` is `q` before rotation."""

    bare_q: Float[Array, "batch query_heads head_dim"]
    q: Float[Array, "batch query_heads head_dim"]
    k: Float[Array, "batch kv_heads head_dim"]
    v: Float[Array, "batch kv_heads head_dim"]


class LayerTrace(NamedTuple):
    """What happened in one layer at one step, for telemetry; NaN where it does not apply."""

    requested: Bool[Array, " batch"]  # the row's own wish
    refreshed: Bool[Array, " batch"]  # after the row rule
    similarity: Float[Array, " batch"]  # cosine with the query of the last refresh
    overlap: Float[
        Array, " batch"
    ]  # at a refresh: Jaccard overlap of what was held and what is now, mean over kv heads
    coverage: Float[Array, " batch"]  # attention mass on the selection, mean over query heads; when asked for


def attend(
    recycling: Recycling,
    layer: Int[Array, ""],
    token: LayerInput,
    cache: KVCache,
    selection: Selection,
    memory: RefreshMemory,
    *,
    lengths: Int[Array, " batch"],
    step: Int[Array, ""],
    active: Bool[Array, " batch"],
    kind: StepKind,
    coverage: bool,
    implementation: str | None,
) -> tuple[Float[Array, "batch query_heads head_dim"], Selection, RefreshMemory, LayerTrace]:
    """Attention of the present token, and the layer's selection and memory after it.

    `lengths` count the present token, `step` is 1 for the first decode step after prefill. Inactive rows change
    nothing and their output means nothing.
    """
    query = _mean_query(recycling, token.bare_q, token.q)
    since = memory.steps_since[layer]
    similarity = _cosine(query, memory.query[layer])
    if kind == "scheduled":
        requested = recycling.schedule.wants(step, since, similarity) & active
        refreshing = _agree(recycling.rows, requested, active)
    else:
        requested = refreshing = active & (kind == "refresh")

    def reuse(selection: Selection):
        with jax.named_scope("attention/recycled"):
            entries = recycling.selector.entry_for(lengths - 1, since)
            # past the end: the row writes nothing
            entries = jnp.where(active, entries, recycling.selector.k)
            aged = Selection(
                _append_position(selection.positions, layer, entries, lengths - 1),
                selection.compact.append(layer, entries, token.k, token.v),
            )
            attended = selection_attention(
                token.q, aged.compact, aged.positions[layer] >= 0, layer=layer, implementation=implementation
            )
            return attended, aged, jnp.full(lengths.shape, jnp.nan)

    def refresh(selection: Selection):
        # What the rows that do not refresh get: when all that are active do, nothing is worth computing for the others.
        if recycling.rows_agree:
            other_attended, other = jnp.zeros_like(token.q), selection
        else:
            other_attended, other, _ = reuse(selection)
        with jax.named_scope("attention/refresh"):
            here = {"layer": layer, "implementation": implementation}
            attended = None
            if recycling.refresh == "full":
                scores, attended = recycling.scorer.score_and_attend(token.q, cache, lengths, **here)
            else:
                scores = recycling.scorer.score(token.q, cache, lengths, **here)
            positions = recycling.selector.select(scores, lengths, implementation=implementation)
            compact = gather_selection(cache, positions, other.compact, rows=refreshing, **here)
            if attended is None:
                attended = selection_attention(token.q, compact, positions >= 0, **here)
            kept = _where_rows(refreshing, positions, other.positions[layer])
            new = Selection(other.positions.at[layer].set(kept), compact)
            overlap = selection_overlap(selection.positions[layer], positions, lengths - 1 - since)
            return (
                _where_rows(refreshing, attended, other_attended),
                new,
                jnp.where(refreshing, overlap, jnp.nan),
            )

    if kind == "scheduled":
        attended, selection, overlap = lax.cond(jnp.any(refreshing), refresh, reuse, selection)
    else:
        attended, selection, overlap = (refresh if kind == "refresh" else reuse)(selection)

    memory = RefreshMemory(
        query=memory.query.at[layer].set(_where_rows(refreshing, query, memory.query[layer])),
        steps_since=memory.steps_since.at[layer].set(jnp.where(refreshing, 0, since + active)),
    )
    covered = jnp.full(lengths.shape, jnp.nan)
    if coverage:
        covered = _coverage(token.q, cache, layer, lengths, selection.positions[layer], implementation)
    return attended, selection, memory, LayerTrace(requested, refreshing, similarity, overlap, covered)


def first_selection(
    recycling: Recycling,
    cache: KVCache,
    lengths: Int[Array, " batch"],
    bare_q: Float[Array, "layers batch query_heads head_dim"],
    q: Float[Array, "layers batch query_heads head_dim"],
    *,
    implementation: str | None,
) -> tuple[Selection, RefreshMemory]:
    """The selections and memory after prefill, made in every layer by the queries of the last prompt token."""

    budget = recycling.selector.k
    layers, batch, kv_heads = cache.layers, cache.batch, cache.kv_heads
    selection = Selection(jnp.full((layers, batch, kv_heads, budget), -1, jnp.int32), cache.empty_like(capacity=budget))

    def select_in_layer(layer: Int[Array, ""], selection: Selection) -> Selection:
        here = {"layer": layer, "implementation": implementation}
        scores = recycling.scorer.score(q[layer], cache, lengths, **here)
        positions = recycling.selector.select(scores, lengths, implementation=implementation)
        compact = gather_selection(cache, positions, selection.compact, **here)
        return Selection(selection.positions.at[layer].set(positions), compact)

    selection = lax.fori_loop(0, layers, select_in_layer, selection)
    return selection, RefreshMemory(_mean_query(recycling, bare_q, q), jnp.zeros((layers, batch), jnp.int32))


def _mean_query(
    recycling: Recycling,
    bare_q: Float[Array, "*rows query_heads head_dim"],
    q: Float[Array, "*rows query_heads head_dim"],
) -> Float[Array, "*rows head_dim"]:
    """The query that schedules compare: mean over heads, float32."""
    chosen = bare_q if recycling.schedule.query_point == "before_rope" else q
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


def _coverage(q, cache, layer, lengths, positions, implementation) -> Float[Array, " batch"]:
    mass = token_scores(q, cache, lengths, layer=layer, group_reduction="mean", implementation=implementation)
    held = jnp.take_along_axis(mass, jnp.maximum(positions, 0), axis=-1)
    return jnp.mean(jnp.sum(jnp.where(positions >= 0, held, 0.0), axis=-1), axis=-1)


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
