"""TokenSelect: the query heads vote for slots, and all attend the same ones."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache, gather_attention
from recycled_jax import rope
from recycled_jax.frame import Attended, Axes, Here, LastQueries, LayerTrace, Method, TopK
from recycled_jax.frame.method import in_words, slots_held
from recycled_jax.policies.policy import Policy

Positions = Literal["true", "compact"]
QueryHeads = Float[Array, "batch query_heads head_dim"]
Keys = Float[Array, "batch kv_heads slots head_dim"]


class Placement(ABC):
    """From which positions slots vote, and at which they are attended. `bare_q` is `q` before rotation, keys stand in
    the cache rotated to their true positions."""

    @abstractmethod
    def voters(
        self, bare_q: QueryHeads, q: QueryHeads, keys: Keys, frequencies: Float[Array, " half"]
    ) -> tuple[QueryHeads, Keys]:
        """The query and the keys of all slots, for the vote."""

    @abstractmethod
    def attend(
        self,
        bare_q: QueryHeads,
        q: QueryHeads,
        cache: KVCache,
        positions: Int[Array, "batch 1 entries"],
        frequencies: Float[Array, " half"],
        here: Here,
    ) -> QueryHeads:
        """Attention over the slots at `positions`."""


@dataclass(frozen=True)
class TruePlacement(Placement):
    """Where they stand in the text."""

    def voters(self, bare_q, q, keys, frequencies):
        return q, keys

    def attend(self, bare_q, q, cache, positions, frequencies, here):
        return gather_attention(q, cache, positions, **here.to_op)


@dataclass(frozen=True)
class CompactPlacement(Placement):
    """All slots vote from `distance`, and are attended at their ranks in the selection, so that no distance is longer
    than the selection. Keys are turned anew at every step, those of the whole cache for a vote."""

    distance: int

    def voters(self, bare_q, q, keys, frequencies):
        slots = jnp.arange(keys.shape[2])
        distance = jnp.full((1, 1), self.distance)
        turned = _turn(bare_q[:, :, None], distance, frequencies)[:, :, 0]
        return turned, _turn(keys, -slots[None, :], frequencies)

    def attend(self, bare_q, q, cache, positions, frequencies, here):
        batch, heads, head_dim = q.shape
        past_end = cache.capacity
        slots = jnp.sort(jnp.where(positions[:, 0] < 0, past_end, positions[:, 0]), axis=-1)
        in_use, ranks = slots < past_end, jnp.arange(slots.shape[-1])[None, :]
        at = jnp.minimum(slots, past_end - 1)
        keys, values = (
            jnp.take_along_axis(stored, at[:, None, :, None], axis=2)
            for stored in (cache.keys(here.layer), cache.values(here.layer))
        )
        keys = _turn(keys, ranks - at, frequencies)
        q = _turn(bare_q[:, :, None], jnp.sum(in_use, axis=-1, keepdims=True) - 1, frequencies)
        grouped = q.reshape(batch, cache.kv_heads, -1, head_dim)
        logits = head_dim**-0.5 * jnp.einsum("bngd,bnsd->bngs", grouped, keys, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where(in_use[:, None, None, :], logits, -jnp.inf), axis=-1)
        output = jnp.einsum("bngs,bnsd->bngd", p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return output.reshape(batch, heads, head_dim).astype(bare_q.dtype)


@dataclass(frozen=True)
class SoftVote:
    """Every query head has one vote and spreads it over the slots between sinks and recent window, by a softmax of
    their products with the query times `scale`."""

    sinks: int
    recent: int
    scale: float

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"vote_scale={self.scale} must be above 0")

    def count(
        self, q: QueryHeads, keys: Float[Array, "batch kv_heads capacity head_dim"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch 1 capacity"]:
        """The sum of all heads' votes, 0 outside."""
        batch, kv_heads, capacity, head_dim = keys.shape
        slots = jnp.arange(capacity)[None, :]
        middle = ((slots >= self.sinks) & (slots < lengths[:, None] - self.recent))[:, None, None, :]
        grouped = q.astype(keys.dtype).reshape(batch, kv_heads, -1, head_dim)
        products = jnp.einsum("bngd,bntd->bngt", grouped, keys, preferred_element_type=jnp.float32)
        # a lowest value and not -inf: where nothing lies between, the softmax stays finite
        logits = jnp.where(middle, self.scale * products, jnp.finfo(jnp.float32).min)
        votes = jnp.where(middle, jax.nn.softmax(logits, axis=-1), 0.0)
        return jnp.sum(votes, axis=(1, 2))[:, None, :]


@struct.dataclass
class KeptSelection:
    """A selection and what decides how long it is kept."""

    positions: Int[Array, "layers batch 1 entries"]
    query: Float[Array, "layers batch channels"]  # float32: the query heads, taken together, that made it
    steps_since: Int[Array, "layers batch"]  # steps that it was kept; 0 right after a retrieval
    frequencies: Float[Array, "layers half"]  # of rotation


@dataclass(frozen=True)
class TokenSelect(Method):
    """A row keeps its selection while the cosine of its query, all heads taken together, with the one that made it is
    at least `threshold`, and for at most `max_stride` steps, whose tokens are all attended besides.

    Queries are compared before rotation: in the release all are rotated to one position, which cancels.
    """

    vote: SoftVote
    selector: TopK
    placement: Placement
    threshold: float
    max_stride: int

    @property
    def axes(self):
        when = f"query-check(threshold={self.threshold}, max_stride={self.max_stride}) by all heads together"
        return Axes(in_words(self.vote), in_words(self.selector), when)

    @property
    def observers(self):
        return (LastQueries(1),)

    def begin(self, prefilled, *, implementation):
        cache, lengths = prefilled.cache, prefilled.prompts.lengths
        window, one = prefilled.prompts.seen(LastQueries(1)), jnp.asarray(rope.frequencies(prefilled.prompts.config))
        frequencies = jnp.broadcast_to(one[None, :], (cache.layers, one.shape[0]))

        def of_layer(layer):
            bare_q, q = window.bare_q[layer, :, :, -1], window.q[layer, :, :, -1]
            votes = self.vote.count(*self.placement.voters(bare_q, q, cache.keys(layer), frequencies[layer]), lengths)
            return self.selector.select(votes, lengths, implementation=implementation)

        return KeptSelection(
            lax.map(of_layer, jnp.arange(cache.layers)),
            _together(window.bare_q[..., -1, :]),
            jnp.zeros((cache.layers, cache.batch), jnp.int32),
            frequencies,
        )

    def attend(self, role, token, cache, state: Any, handed, here):
        assert cache is not None
        query, old = _together(token.bare_q), state.query[here.layer]
        since, kept, frequencies = (x[here.layer] for x in (state.steps_since, state.positions, state.frequencies))
        norms = jnp.linalg.norm(query, axis=-1) * jnp.linalg.norm(old, axis=-1)
        similarity = jnp.sum(query * old, axis=-1) / jnp.maximum(norms, 1e-30)
        retrieves = ((similarity < self.threshold) | (since + 1 >= self.max_stride)) & here.active

        def retrieve():
            with jax.named_scope("attention/select"):
                voters = self.placement.voters(token.bare_q, token.q, cache.keys(here.layer), frequencies)
                votes = self.vote.count(*voters, here.lengths)
                return self.selector.select(votes, here.lengths, implementation=here.implementation)

        found = lax.cond(jnp.any(retrieves), retrieve, lambda: kept)
        entry = jnp.where(here.active, since, kept.shape[-1])  # past the end: the row writes nothing
        grown = kept.at[jnp.arange(since.shape[0]), 0, entry].set(here.lengths - 1, mode="drop")
        positions = jnp.where(retrieves[:, None, None], found, grown)
        with jax.named_scope("attention/selection"):
            output = self.placement.attend(token.bare_q, token.q, cache, positions, frequencies, here)
        state = KeptSelection(
            state.positions.at[here.layer].set(positions),
            state.query.at[here.layer].set(jnp.where(retrieves[:, None], query, old)),
            state.steps_since.at[here.layer].set(jnp.where(retrieves, 0, since + here.active)),
            state.frequencies,
        )
        nothing = jnp.full(since.shape, jnp.nan)
        scored = jnp.where(retrieves, here.lengths.astype(jnp.float32), 0.0)
        trace = LayerTrace(retrieves, retrieves, similarity, nothing, slots_held(positions), scored, nothing)
        return Attended(output, state, handed, trace, positions)


def _together(q: Float[Array, "*shape query_heads head_dim"]) -> Float[Array, "*shape channels"]:
    """All heads as one long vector, float32."""
    return q.astype(jnp.float32).reshape(*q.shape[:-2], -1)


def _turn(
    x: Float[Array, "batch heads tokens head_dim"], by: Int[Array, "#batch #tokens"], frequencies: Float[Array, " half"]
) -> Float[Array, "batch heads tokens head_dim"]:
    """`x` moved by so many positions."""
    angles = by[..., None].astype(jnp.float32) * frequencies[None, None, :]
    return rope.rotate(x, jnp.cos(angles), jnp.sin(angles))


def token_select(
    k: int = 2688,
    sinks: int = 128,
    recent: int = 512,
    threshold: float = 0.9,
    max_stride: int = 16,
    pool: int = 1,
    vote_scale: float = 1.0,
    positions: Positions = "true",
) -> Policy:
    """TokenSelect: the query heads vote for slots, which all of them attend together with sinks and recent window; the
    set is kept while the query stays `threshold` close to the one that made it, for at most `max_stride` steps, whose
    tokens come on top of `k` (Wu et al., arXiv 2411.02886)."""
    if max_stride < 1:
        raise ValueError(f"max_stride={max_stride} must be at least 1 (1 selects at every step)")
    if positions not in get_args(Positions):
        raise ValueError(f"positions={positions!r} must be one of {', '.join(get_args(Positions))}")
    method = TokenSelect(
        SoftVote(sinks, recent, vote_scale),
        TopK(k, pool, sinks, recent, tail=max_stride - 1, shared="sum"),
        TruePlacement() if positions == "true" else CompactPlacement(recent),
        threshold,
        max_stride,
    )
    return Policy("token-select", method)
