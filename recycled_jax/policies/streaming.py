"""StreamingLLM: attention sinks and a recent window."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache
from recycled_jax import rope
from recycled_jax.config import LlamaConfig
from recycled_jax.frame import Never, RecencyScorer, Recycling, RecyclingState, TopK
from recycled_jax.frame.method import Here, Method
from recycled_jax.policies.policy import Policy

# `true`: where tokens stood. `shifted`: where they stand in the cache, as if what was evicted had never been.
Positions = Literal["true", "shifted"]


@struct.dataclass
class ShiftedState:
    """`sinks` are the sinks at their true positions, from which every step turns those in the buffer anew: turning them
    on from step to step would add up rounding errors."""

    recycling: RecyclingState
    sinks: KVCache
    config: LlamaConfig = struct.field(pytree_node=False)


@dataclass(frozen=True)
class ShiftedSinks(Method):
    """`recycling`, sinks and a recent window, with no gap between the two: once tokens have been evicted, the sinks
    follow, as many positions on. So every key has the distance to the query that it has in the cache, where the paper
    counts positions; to turn the few sinks is ours, for the recent ones stand at their true distances already."""

    recycling: Recycling

    def __post_init__(self) -> None:
        if self.recycling.selector.sinks < 1:
            raise ValueError("sinks=0 leaves nothing to shift; use positions='true'")

    @property
    def axes(self):
        return self.recycling.axes

    @property
    def observers(self):
        return self.recycling.observers

    @property
    def keeps_cache(self):
        return self.recycling.keeps_cache

    def begin(self, prefilled, *, implementation):
        state, cache = self.recycling.begin(prefilled, implementation=implementation), prefilled.cache
        # those past a short prompt are written when their tokens come
        sinks = cache.empty_like(capacity=min(self.recycling.selector.sinks, cache.capacity))
        sinks = jax.lax.fori_loop(
            0, cache.layers, lambda layer, to: to.write(layer, 0, *cache.block(layer, 0, sinks.capacity)), sinks
        )
        return ShiftedState(state, sinks, prefilled.prompts.config)

    def before_layers(self, state, cache):
        return self.recycling.before_layers(state.recycling, cache)

    def attend(self, role, token, cache, state, handed, here):
        # the slot of a token that is no sink lies past the end, and nothing is written
        slots = jnp.where(here.active, here.lengths - 1, state.sinks.capacity)
        sinks = state.sinks.append(here.layer, slots, token.k, token.v)
        selection = self._shift(state.recycling.selection, sinks, state.config, here)
        done = self.recycling.attend(role, token, cache, state.recycling.replace(selection=selection), handed, here)
        return done._replace(state=ShiftedState(done.state, sinks, state.config))

    def _shift(self, selection, sinks: KVCache, config: LlamaConfig, here: Here):
        """The sinks in the buffer, turned on by as many positions as tokens have been evicted."""
        selector = self.recycling.selector
        first = selector.entries - selector.sinks
        k, v = sinks.block(here.layer, 0, sinks.capacity)
        held_k, held_v = selection.compact.block(here.layer, first, sinks.capacity)
        evicted = jnp.maximum(here.lengths - selector.k, 0)
        moved = here.active[:, None, None, None]
        k, v = jnp.where(moved, shift(config, k, evicted), held_k), jnp.where(moved, v, held_v)
        return selection.replace(compact=selection.compact.write(here.layer, first, k, v))


def shift(
    config: LlamaConfig, k: Float[Array, "batch heads tokens head_dim"], by: Int[Array, " batch"]
) -> Float[Array, "batch heads tokens head_dim"]:
    """Keys rotated to positions that lie `by` further on; rotations compose."""
    return rope.rotate(k, *rope.angles(config, jnp.broadcast_to(by[:, None], (k.shape[0], k.shape[2]))))


def streaming(k: int = 1024, sinks: int = 4, positions: Positions = "true", keep_cache: bool = True) -> Policy:
    """StreamingLLM: the first `sinks` slots and the most recent ones, `k` in all; the prompt is read densely.
    `positions` are the true ones, or `shifted` to where tokens stand among those that are left, for texts beyond the
    trained length; `keep_cache=False` drops the full cache (Xiao et al., arXiv 2309.17453)."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions={positions!r} must be one of {', '.join(get_args(Positions))}")
    recycling = Recycling(RecencyScorer(), TopK(k, sinks=sinks), Never(), keep_cache=keep_cache)
    return Policy("streaming", recycling if positions == "true" or sinks == 0 else ShiftedSinks(recycling))
