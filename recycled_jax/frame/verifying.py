"""What methods make of a verified draft: drafted tokens were seen with what the method attends, and some were refused;
now they have been seen with full attention, and those that stand are known (`lossless`).

By default a method goes back to where it was before the draft, and the tokens that stand go through it once more, with
the queries, keys and values of full attention. Recycling takes the scores of the full pass instead, and selects anew.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache
from recycled_jax.frame.layer_plan import Role
from recycled_jax.frame.method import Here, Method, Token, slots_held
from recycled_jax.frame.recycling import Recycling, RecyclingState, RefreshMemory
from recycled_jax.frame.scorers import AttentionScorer
from recycled_jax.frame.selecting import Selecting
from recycled_jax.layers import through

Read = Float[Array, "layers batch"]  # per kv head, in slots of keys of the cache, as `LayerTrace.scored`


class Verified(NamedTuple):
    """The last tokens of every row, as they were seen with full attention: they stand in the cache from slot `first`
    on, and the first `counts` of a row stay; 0 in rows that are idle. Keys and values are as the cache has them."""

    first: Int[Array, " batch"]
    counts: Int[Array, " batch"]
    bare_q: Float[Array, "layers batch query_heads columns head_dim"]
    q: Float[Array, "layers batch query_heads columns head_dim"]
    k: Float[Array, "layers batch kv_heads columns head_dim"]
    v: Float[Array, "layers batch kv_heads columns head_dim"]
    scores: Float[Array, "selecting batch columns heads capacity"] | None  # of the layers that `wanted_scores` names

    def token(self, layer: int | Int[Array, ""], column: Int[Array, ""] | Int[Array, " batch"]) -> Token:
        """Of every row the token of a column, as a layer saw it."""
        rows = jnp.arange(self.first.shape[0])
        return Token(*(heads[layer, rows, :, column] for heads in (self.bare_q, self.q, self.k, self.v)))

    @property
    def last(self) -> Int[Array, " batch"]:
        """The column of the last token that stays; any of an idle row."""
        return jnp.maximum(self.counts - 1, 0)

    def here(self, layer: int | Int[Array, ""], column: Int[Array, ""], implementation: str | None) -> Here:
        """Where and when the token of a column attended, as in a decode step."""
        lengths = self.first + jnp.minimum(column + 1, self.counts)
        return Here(layer, lengths, column + 1, column < self.counts, implementation=implementation)


def wanted_scores(method: Method, layers: int) -> tuple[str, tuple[int, ...]]:
    """How the scores that `after_verification` wants of the full pass are reduced, and of which layers; maybe none."""
    if not isinstance(method, Recycling) or method.schedule.never or not isinstance(method.scorer, AttentionScorer):
        return "max", ()
    selecting = (layer for role, run in method.runs(layers) if role == "select" for layer in run)
    return method.scorer.group_reduction, tuple(selecting)


def replay(
    method: Method, before: Any, seen: Verified, cache: KVCache, *, implementation: str | None
) -> tuple[Any, Read]:
    """The state to go on from, and what had to be read for it.

    `before` is the state before the draft. The tokens that stand are attended one by one; only what they leave in the
    state counts, and what `attend` reads besides scoring is not told (nor done, as nobody uses it).
    """
    columns, (layers, batch) = seen.q.shape[3], seen.q.shape[:2]

    def attend(column, carry):
        state, read = carry
        handed = method.before_layers(state, cache)
        for role, run in method.runs(layers):
            if role == "dense":
                continue

            def in_layer(carry, layer, role: Role = role):
                state, handed = carry
                here = seen.here(layer, column, implementation)
                done = method.attend(role, seen.token(layer, column), cache, state, handed, here)
                return (done.state, done.handed), jnp.where(here.active, done.trace.scored, 0.0)

            (state, handed), scored = through(in_layer, (state, handed), run, cache)
            read = read.at[run.start : run.stop].add(scored)
        return state, read

    nothing = jnp.zeros((layers, batch))
    return lax.fori_loop(0, columns, attend, (before, nothing)) if jax.tree.leaves(before) else (before, nothing)


after_verification = functools.singledispatch(replay)


@after_verification.register
def _(method: Selecting, before, seen, cache, *, implementation):
    """The selection is made at every step; what the scorer keeps of each token is all there is."""
    return _appended(method, before, seen, cache, implementation), jnp.zeros(seen.q.shape[:2])


@after_verification.register
def _(method: Recycling, before, seen, cache, *, implementation):
    """A refresh by the last token that stands, without reading the keys again where the full pass has scored them."""
    if method.schedule.never:
        return replay(method, before, seen, cache, implementation=implementation)
    scorer = _appended(method, before.scorer, seen, cache, implementation)
    layers, batch = seen.q.shape[:2]
    rows, lengths = jnp.arange(batch), seen.first + seen.counts
    _, scored_layers = wanted_scores(method, layers)

    def score(here: Here):
        if seen.scores is None:
            return method.scorer.score(seen.token(here.layer, seen.last), cache, scorer, here)
        place = jnp.searchsorted(jnp.array(scored_layers), here.layer)
        return seen.scores[place, rows, seen.last]

    selection = method.select_all(before.selection, cache, lengths, score, implementation=implementation)
    bare_q, q = (heads[:, rows, :, seen.last].swapaxes(0, 1) for heads in (seen.bare_q, seen.q))
    memory = RefreshMemory(method.mean_query(bare_q, q), jnp.zeros_like(before.memory.steps_since))
    read = 2 * jax.vmap(slots_held)(selection.positions)  # copying a selection reads its keys and values
    if seen.scores is None:
        for role, run in method.runs(layers):
            if role == "select":
                read = read.at[run.start : run.stop].add(method.scorer.reads(lengths, cache)[None])
    return RecyclingState(selection, memory, scorer), jnp.where(seen.counts > 0, read, 0.0)


def _appended(
    method: Selecting | Recycling, state: Any, seen: Verified, cache: KVCache, implementation: str | None
) -> Any:
    """The scorer's state after the tokens that stand, in the layers that score."""
    if not jax.tree.leaves(state):
        return state

    def in_layer(state, layer, column):
        here = seen.here(layer, column, implementation)
        return method.scorer.append(state, seen.token(layer, column), here), None

    def append(column, state):
        for role, run in method.runs(seen.q.shape[0]):
            if role == "select":
                state, _ = through(functools.partial(in_layer, column=column), state, run, cache)
        return state

    return lax.fori_loop(0, seen.q.shape[3], append, state)
