"""InfLLM's choice of blocks, while decoding."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KVCache
from recycled_jax.frame import Attended, Axes, Here, Method, Observer, PromptChunk, Token
from recycled_jax.frame.method import in_words, selecting_trace
from recycled_jax.policies.policy import Policy

_QUERIES_AT_ONCE = 64  # of a prompt's chunk, so that no array of chunk × capacity is made


@dataclass(frozen=True)
class Blocks:
    """Which slots are attended: the first `sinks`, the newest `recent` (self is one), and whole blocks of `block` slots
    between them, all within `k`. Blocks begin at multiples of `block`; of one that the sinks or the recent window reach
    into, only the slots outside count.

    Raises ValueError, naming the argument, for values that cannot be.
    """

    k: int
    block: int
    sinks: int
    recent: int

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1 slot")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be at least 0 slots")
        if self.recent < 1:
            raise ValueError(f"recent={self.recent} must be at least 1 slot: the current token is always read")
        if self.budget < 1:
            raise ValueError(
                f"k={self.k} leaves no room for a block: it must be at least sinks + recent + block = "
                f"{self.sinks + self.recent + self.block}"
            )

    @property
    def budget(self) -> int:
        """Blocks that a selection holds."""
        return (self.k - self.sinks - self.recent) // self.block

    def count(self, capacity: int) -> int:
        """Blocks of a cache; the last may be cut off."""
        return -(-capacity // self.block)

    def is_middle(self, slots: Int[Array, "..."], lengths: Int[Array, "#batch"]) -> Bool[Array, "..."]:
        """Whether slots, `[batch, …]`, are neither sinks nor recent."""
        past = lengths.reshape(lengths.shape + (1,) * (slots.ndim - 1)) - self.recent
        return (slots >= self.sinks) & (slots < past)

    def candidates(self, lengths: Int[Array, " batch"], capacity: int) -> Bool[Array, "batch blocks"]:
        """The blocks with a slot between sinks and recent window."""
        first = jnp.arange(self.count(capacity))[None, :] * self.block
        start, end = jnp.maximum(first, self.sinks), jnp.minimum(first + self.block, lengths[:, None] - self.recent)
        return start < end

    def select(
        self,
        scores: Float[Array, "batch heads blocks"],
        lengths: Int[Array, " batch"],
        *,
        granted: Int[Array, " batch"] | None = None,
        most: int | None = None,
    ) -> Int[Array, "batch heads entries"]:
        """Slots, -1 in empty entries: of the `granted` best candidates (default `budget`; `most` of them at the
        utmost), of the recent window, the sinks. Rows of up to `k` tokens are taken whole."""
        most = self.budget if most is None else most
        batch, heads, blocks = scores.shape
        candidate = self.candidates(lengths, blocks * self.block)[:, None, :]
        best, chosen = lax.top_k(jnp.where(candidate, scores, -jnp.inf), min(most, blocks))
        taken = best > -jnp.inf
        if granted is not None:
            taken &= jnp.arange(best.shape[-1])[None, None, :] < granted[:, None, None]
        within = chosen[..., None] * self.block + jnp.arange(self.block)[None, None, None, :]
        middle = jnp.where(taken[..., None] & self.is_middle(within, lengths), within, -1).reshape(batch, heads, -1)
        kept = jnp.broadcast_to(self._kept(lengths)[:, None, :], (batch, heads, self.recent + self.sinks))
        positions = jnp.concatenate([middle, kept], axis=-1)
        positions = jnp.pad(positions, ((0, 0), (0, 0), (0, max(0, self.k - positions.shape[-1]))), constant_values=-1)
        everything = jnp.arange(positions.shape[-1])[None, None, :]
        everything = jnp.where(everything < lengths[:, None, None], everything, -1)
        return jnp.where((lengths <= self.k)[:, None, None], everything, positions).astype(jnp.int32)

    def _kept(self, lengths: Int[Array, " batch"]) -> Int[Array, "batch kept"]:
        recent = lengths[:, None] - self.recent + jnp.arange(self.recent)[None, :]
        sinks = jnp.arange(self.sinks)[None, :]
        sinks = jnp.where(sinks < lengths[:, None] - self.recent, sinks, -1)
        return jnp.concatenate([jnp.maximum(recent, -1), sinks], axis=-1)


def attend_and_weigh(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    positions: Int[Array, "batch heads entries"],
    layer: Int[Array, ""] | int,
) -> tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch query_heads entries"]]:
    """Attention over the slots at `positions`, and its probabilities, float32, 0 for empty entries.

    Unlike `gather_attention` it gives the probabilities; it has no kernel, and on TPU XLA may copy the layer.
    """
    batch, heads, head_dim = q.shape
    positions = jnp.broadcast_to(positions, (batch, cache.kv_heads, positions.shape[-1]))
    at, in_use = jnp.maximum(positions, 0)[..., None], (positions >= 0)[:, :, None, :]
    keys, values = (jnp.take_along_axis(stored, at, axis=2) for stored in (cache.keys(layer), cache.values(layer)))
    grouped = q.astype(keys.dtype).reshape(batch, cache.kv_heads, -1, head_dim)
    logits = head_dim**-0.5 * jnp.einsum("bngd,bnsd->bngs", grouped, keys, preferred_element_type=jnp.float32)
    p = jax.nn.softmax(jnp.where(in_use, logits, -jnp.inf), axis=-1)
    output = jnp.einsum("bngs,bnsd->bngd", p.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return output.reshape(q.shape).astype(q.dtype), p.reshape(batch, heads, -1)


@dataclass(frozen=True)
class AttentionReceived(Observer):
    """What every slot has received from each query head while it was one of the `recent` newest: sums of probabilities,
    float32 `[layers, batch, query_heads, capacity]`."""

    recent: int

    def start(self, config, *, batch, capacity, dtype):
        return jnp.zeros((config.layers, batch, config.query_heads, capacity), jnp.float32)

    def observe(self, seen, chunk: PromptChunk, cache):
        batch, _, tokens, head_dim = chunk.q.shape
        keys = cache.keys(chunk.layer)
        slots = jnp.arange(cache.capacity)
        step = next(size for size in range(min(_QUERIES_AT_ONCE, tokens), 0, -1) if tokens % size == 0)

        def add(index, received):
            q = lax.dynamic_slice_in_dim(chunk.q, index * step, step, axis=2)
            own = chunk.start + index * step + jnp.arange(step)
            grouped = q.astype(keys.dtype).reshape(batch, cache.kv_heads, -1, step, head_dim)
            logits = jnp.einsum("bngqd,bntd->bngqt", grouped, keys, preferred_element_type=jnp.float32)
            past = slots[None, :] <= own[:, None]
            logits = jnp.where(past[None, None, None], logits * head_dim**-0.5, -jnp.inf)
            near = past & (slots[None, :] > own[:, None] - self.recent)
            counts = near[None] & (own[None, :] < chunk.lengths[:, None])[:, :, None]
            p = jnp.where(counts[:, None, None], jax.nn.softmax(logits, axis=-1), 0.0)
            return received + jnp.sum(p, axis=3).reshape(received.shape)

        return seen.at[chunk.layer].set(lax.fori_loop(0, tokens // step, add, seen[chunk.layer]))


@struct.dataclass
class BlockMemory:
    """What stands for the blocks."""

    received: Float[Array, "layers batch query_heads capacity"]  # attention, while in the recent window
    representatives: Float[Array, "layers batch query_heads blocks head_dim"]  # of the blocks that are candidates


@dataclass(frozen=True)
class Representatives:
    """A block's representative, for every query head: the mean of the `count` keys which received most attention from
    it while they were in the recent window."""

    blocks: Blocks
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.blocks.block:
            raise ValueError(f"representatives={self.count} must be between 1 and block = {self.blocks.block}")

    @property
    def observers(self) -> tuple[Observer, ...]:
        return (AttentionReceived(self.blocks.recent),)

    def begin(self, prefilled) -> BlockMemory:
        """After the prompts, of all layers."""
        cache, lengths = prefilled.cache, prefilled.prompts.lengths
        received = prefilled.prompts.seen(self.observers[0])
        numbers = jnp.broadcast_to(
            jnp.arange(self.blocks.count(cache.capacity))[None, :], (cache.batch, self.blocks.count(cache.capacity))
        )

        def of_layer(layer):
            return self._of(numbers, cache.keys(layer), received[layer], lengths)

        return BlockMemory(received, lax.map(of_layer, jnp.arange(cache.layers)))

    def append(self, memory: BlockMemory, cache: KVCache, here: Here) -> BlockMemory:
        """One slot has left the recent window: its block has changed."""
        left = here.lengths - 1 - self.blocks.recent
        changed = jnp.maximum(left, 0) // self.blocks.block
        new = self._of(changed[:, None], cache.keys(here.layer), memory.received[here.layer], here.lengths)[:, :, 0]
        changed = jnp.where(
            here.active & (left >= 0), changed, memory.representatives.shape[3]
        )  # past the end: no write
        rows = jnp.arange(changed.shape[0])
        reps = memory.representatives.at[here.layer, rows, :, changed].set(new, mode="drop")
        return BlockMemory(memory.received, reps)

    def receive(
        self,
        memory: BlockMemory,
        probabilities: Float[Array, "batch query_heads entries"],
        positions: Int[Array, "batch 1 entries"],
        here: Here,
    ) -> BlockMemory:
        """The recent window has been attended once more."""
        slots = positions[:, 0]
        near = (slots >= here.lengths[:, None] - self.blocks.recent) & (slots >= 0) & here.active[:, None]
        slots = jnp.where(near, slots, memory.received.shape[-1])
        rows = jnp.arange(slots.shape[0])[:, None]
        added = jnp.swapaxes(probabilities, 1, 2)
        received = memory.received.at[here.layer, rows, :, slots].add(added, mode="drop")
        return BlockMemory(received, memory.representatives)

    def _of(
        self,
        numbers: Int[Array, "batch blocks"],
        keys: Float[Array, "batch kv_heads capacity head_dim"],
        received: Float[Array, "batch query_heads capacity"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch query_heads blocks head_dim"]:
        batch, heads, capacity = received.shape
        group = heads // keys.shape[1]
        slots = numbers[..., None] * self.blocks.block + jnp.arange(self.blocks.block)[None, None, :]
        counts = self.blocks.is_middle(slots, lengths)  # the cut-off end of the last block is never below a length
        slots = jnp.minimum(slots, capacity - 1)
        weight = jnp.take_along_axis(received, slots.reshape(batch, 1, -1), axis=2)
        weight = jnp.where(counts[:, None], weight.reshape(batch, heads, *slots.shape[1:]), -jnp.inf)
        heaviest, places = lax.top_k(weight, self.count)
        chosen = jnp.take_along_axis(slots[:, None], places, axis=-1)  # [batch, heads, blocks, count]
        rows = jnp.arange(batch)[:, None, None, None]
        of_head = (jnp.arange(heads) // group)[None, :, None, None]
        found = keys[rows, of_head, chosen].astype(jnp.float32)
        used = (heaviest > -jnp.inf)[..., None]
        return jnp.sum(jnp.where(used, found, 0.0), axis=-2) / jnp.maximum(jnp.sum(used, axis=-2), 1)


@dataclass(frozen=True)
class InfLLM(Method):
    """One choice of blocks for all heads, anew at every step: by the product of the query heads, taken together, with
    the blocks' representatives."""

    blocks: Blocks
    representatives: Representatives

    @property
    def axes(self):
        return Axes(f"representatives({self.representatives.count} of a block)", in_words(self.blocks), "every-step")

    @property
    def observers(self):
        return self.representatives.observers

    def begin(self, prefilled, *, implementation):
        return self.representatives.begin(prefilled)

    def attend(self, role, token: Token, cache, state: Any, handed, here: Here):
        assert cache is not None
        with jax.named_scope("attention/select"):
            state = self.representatives.append(state, cache, here)
            reps = state.representatives[here.layer]
            scores = jnp.einsum("bhd,bhpd->bp", token.q.astype(jnp.float32), reps)
            positions = self.blocks.select(scores[:, None, :], here.lengths)
        with jax.named_scope("attention/selection"):
            output, probabilities = attend_and_weigh(token.q, cache, positions, here.layer)
            state = self.representatives.receive(state, probabilities, positions, here)
        return Attended(
            output, state, handed, selecting_trace(positions, representatives_read(reps, cache, here), here), positions
        )


def representatives_read(
    reps: Float[Array, "batch query_heads blocks head_dim"], cache: KVCache, here: Here
) -> Float[Array, " batch"]:
    """What reading all representatives is worth, in slots of keys: one vector per block and query head."""
    return jnp.full(here.lengths.shape, float(reps.shape[1] * reps.shape[2] / cache.kv_heads))


def infllm(k: int = 6272, block: int = 128, sinks: int = 128, recent: int = 4096, representatives: int = 4) -> Policy:
    """InfLLM while decoding: sinks, recent window and the blocks whose representative keys fit the query best, one set
    for all heads, at their true positions and without offloading (Xiao et al., arXiv 2402.04617)."""
    blocks = Blocks(k, block, sinks, recent)
    return Policy("infllm", InfLLM(blocks, Representatives(blocks, representatives)))
