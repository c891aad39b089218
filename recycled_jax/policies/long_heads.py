"""LongHeads: every query reads a few whole chunks, laid out next to each other, so that positions stay below the length
the model was trained to (Lu et al., Findings of EMNLP 2024, arXiv 2402.10685).

Rotary attention depends on the distance of query and key alone. So no key is moved: it is the query that is rotated
anew for every chunk it reads, to where it would stand if the chosen chunks lay next to each other.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KVCache, chunk_scores, prefill_attention
from recycled_jax import rope
from recycled_jax.config import LlamaConfig
from recycled_jax.frame.method import Attended, Axes, Here, Method, Token, in_words, selecting_trace
from recycled_jax.frame.prompt import PrefillAttention, PromptChunk
from recycled_jax.policies.policy import Policy
from recycled_jax.prefill.attention import attend_blocks, by_kv_head, gather_slots


@dataclass(frozen=True)
class ChunkChoice:
    """Which chunks a query reads: the first one, its own and the one before, and the best of those between, `k` slots
    in all. Queries up to the `begin`-th read everything.

    Raises ValueError, naming the argument, for values that cannot be.
    """

    k: int
    chunk: int
    begin: int

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1 slot")
        if self.k < 3 * self.chunk or self.k % self.chunk:
            raise ValueError(
                f"k={self.k} must be a multiple of chunk={self.chunk}, at least {3 * self.chunk}: the first, the "
                "previous and the current chunk are always read"
            )
        if self.begin % self.chunk or self.begin < self.k - self.chunk:
            raise ValueError(
                f"begin={self.begin} must be a multiple of chunk={self.chunk}, at least k - chunk = "
                f"{self.k - self.chunk}: shorter prompts are read whole"
            )

    @property
    def entries(self) -> int:
        """The most slots that a query reads."""
        return max(self.k, self.begin)

    def choose(
        self, scores: Float[Array, "batch kv_heads queries chunks"], lengths: Int[Array, "#batch queries"]
    ) -> Bool[Array, "batch kv_heads queries chunks"]:
        """The chunks each query reads; `lengths` count the slots up to and with its own."""
        chunks = jnp.arange(scores.shape[-1])[None, None, None, :]
        lengths = lengths[:, None, :, None]
        current = (lengths - 1) // self.chunk
        between = (chunks > 0) & (chunks < current - 1)
        everything = (lengths <= self.begin) | (lengths <= self.k)
        chosen = (chunks <= current) & (everything | ~between)
        free = min(self.k // self.chunk - 3, scores.shape[-1])
        if free:
            _, best = lax.top_k(jnp.where(between, scores, -jnp.inf), free)
            among_best = jnp.put_along_axis(jnp.zeros(scores.shape, bool), best, True, axis=-1, inplace=False)
            chosen |= between & among_best
        return jnp.broadcast_to(chosen, scores.shape)

    def standpoints(
        self, chosen: Bool[Array, "batch kv_heads queries chunks"], lengths: Int[Array, "#batch queries"]
    ) -> Int[Array, "batch kv_heads queries chunks"]:
        """The position from which a query sees a chunk as it would if all it has chosen lay next to each other: as many
        chunks after that chunk as are chosen after it."""
        return self.current_places(chosen) * self.chunk + ((lengths - 1) % self.chunk)[:, None, :, None]

    def current_places(
        self, chosen: Bool[Array, "batch kv_heads queries chunks"]
    ) -> Int[Array, "batch kv_heads queries chunks"]:
        """The number of the chunk that a standpoint lies in."""
        places = jnp.cumsum(chosen, axis=-1)
        return jnp.arange(chosen.shape[-1])[None, None, None, :] + places[..., -1:] - places


@struct.dataclass
class ChunkMemory:
    """What is kept of each layer besides keys and values."""

    summaries: Float[
        Array, "layers batch query_heads chunks head_dim"
    ]  # float32, of complete chunks; others never read
    open_q: Float[Array, "layers batch query_heads chunk head_dim"]  # queries of the chunk that is not complete yet
    config: LlamaConfig = struct.field(pytree_node=False)

    def scores(
        self, layer: Int[Array, ""] | int, bare_q: Float[Array, "batch query_heads queries head_dim"]
    ) -> Float[Array, "batch kv_heads queries chunks"]:
        """Products of summaries and queries before rotation, the largest of a group; our choice for grouped heads,
        which the released code does not know."""
        products = jnp.einsum("bhtd,bhcd->bhtc", bare_q.astype(jnp.float32), self.summaries[layer])
        return jnp.max(products.reshape(products.shape[0], self.config.kv_heads, -1, *products.shape[2:]), axis=2)


def summarise(
    config: LlamaConfig,
    q: Float[Array, "batch query_heads chunk head_dim"],
    k: Float[Array, "batch kv_heads chunk head_dim"],
    v: Float[Array, "batch kv_heads chunk head_dim"],
    first: Int[Array, "#batch"],
) -> Float[Array, "batch query_heads head_dim"]:
    """A vector in the place of a chunk's keys, for every query head, float32.

    Attention within the chunk, in both directions, averaged over its queries; that average, taken for a query, picks
    among the keys. The keys are those rotated as if the chunk, which begins at slot `first`, began at 0.
    """
    batch, kv_heads, chunk, head_dim = k.shape
    grouped = q.reshape(batch, kv_heads, -1, chunk, head_dim).astype(jnp.float32)
    k, v, scale = k.astype(jnp.float32), v.astype(jnp.float32), head_dim**-0.5
    weights = jax.nn.softmax(scale * jnp.einsum("bngtd,bnud->bngtu", grouped, k), axis=-1)
    mean = jnp.einsum("bngu,bnud->bngd", jnp.mean(weights, axis=3), v)
    local = rope.rotate(k, *rope.angles(config, jnp.broadcast_to(-first[:, None], (first.shape[0], chunk))))
    picked = jax.nn.softmax(scale * jnp.einsum("bngd,bnud->bngu", mean, local), axis=-1)
    return jnp.einsum("bngu,bnud->bngd", picked, local).reshape(batch, -1, head_dim)


@dataclass(frozen=True)
class LongHeadsPrefill(PrefillAttention):
    """Prompts are read as they are continued: every query chooses its chunks. The memory that decoding goes on with is
    made on the way."""

    choice: ChunkChoice

    def check(self, config, chunk):
        if chunk % self.choice.chunk:
            raise ValueError(
                f"prompts are read {chunk} tokens at a time, expected a multiple of chunk={self.choice.chunk} "
                "(of long-heads)"
            )

    def start(self, config, *, batch, capacity, dtype):
        chunks, per_layer = -(-capacity // self.choice.chunk), (config.layers, batch, config.query_heads)
        return ChunkMemory(
            summaries=jnp.zeros((*per_layer, chunks, config.head_dim), jnp.float32),
            open_q=jnp.zeros((*per_layer, self.choice.chunk, config.head_dim), dtype),
            config=config,
        )

    def attend(self, carried, handed, chunk, cache):
        memory = self._remember(carried, chunk)
        read = chunk.q.shape[2]

        def dense():
            return prefill_attention(
                chunk.q, cache, chunk.start, layer=chunk.layer, implementation=chunk.implementation
            )

        def remapped():
            lengths = (chunk.start + 1 + jnp.arange(read))[None, :]
            chosen = self.choice.choose(memory.scores(chunk.layer, chunk.bare_q), lengths)
            return self._attend_chosen(memory.config, chunk, cache, chosen, lengths)

        attended = lax.cond(chunk.start + read <= self.choice.entries, dense, remapped)
        return attended, memory, handed

    def _remember(self, memory: ChunkMemory, chunk: PromptChunk) -> ChunkMemory:
        """The memory with the summaries of this piece's chunks, and with the queries of the chunks that prompts end in.
        Summaries of chunks with padding in them are of no use; decoding makes them anew when they are complete."""
        width, first = self.choice.chunk, chunk.start // self.choice.chunk
        batch, query_heads, read, head_dim = chunk.q.shape

        def per_chunk(x):
            """[chunks * batch, heads, chunk, head_dim]"""
            parts = x.reshape(batch, x.shape[1], read // width, width, head_dim)
            return jnp.moveaxis(parts, 2, 0).reshape(-1, x.shape[1], width, head_dim)

        starts = jnp.repeat(chunk.start + width * jnp.arange(read // width), batch)
        new = summarise(memory.config, per_chunk(chunk.q), per_chunk(chunk.k), per_chunk(chunk.v), starts)
        new = jnp.moveaxis(new.reshape(-1, batch, query_heads, head_dim), 0, 2)
        summaries = lax.dynamic_update_slice(memory.summaries, new[None], (chunk.layer, 0, 0, first, 0))

        open_start = chunk.lengths // width * width - chunk.start
        columns = jnp.clip(open_start[:, None] + jnp.arange(width)[None, :], 0, read - 1)
        here = (open_start >= 0) & (open_start < read)
        tail = jnp.take_along_axis(chunk.q, columns[:, None, :, None], axis=2).astype(memory.open_q.dtype)
        kept = jnp.where(here[:, None, None, None], tail, memory.open_q[chunk.layer])
        return ChunkMemory(summaries, memory.open_q.at[chunk.layer].set(kept), memory.config)

    def _attend_chosen(
        self,
        config: LlamaConfig,
        chunk: PromptChunk,
        cache: KVCache,
        chosen: Bool[Array, "batch kv_heads queries chunks"],
        lengths: Int[Array, "1 queries"],
    ) -> Float[Array, "batch query_heads queries head_dim"]:
        """A chunk is multiplied with all queries, whether they chose it or not: the work is that of dense attention.

        A query turns to its place in its chunk once, and from there by whole chunks, whose few angles are looked up:
        sines for every query and chunk would cost as much as the products.
        """
        width, queries = self.choice.chunk, chunk.bare_q.astype(jnp.float32)
        grouped = by_kv_head(rope.rotate(queries, *rope.angles(config, (lengths - 1) % width)), config.kv_heads)
        places = self.choice.current_places(chosen)
        cosine, sine = rope.angles(config, jnp.arange(chosen.shape[-1])[None, :] * width)

        def read(number):
            place = lax.dynamic_index_in_dim(places, number, axis=3, keepdims=False)
            place = place.reshape(-1, place.shape[-1])
            return turn(grouped, cosine[0, place], sine[0, place]), *cache.block(chunk.layer, number * width, width)

        def visible(number):
            past = number * width + jnp.arange(width)[None, :] < lengths[0][:, None]
            return lax.dynamic_index_in_dim(chosen, number, axis=3)[:, :, None] & past[None, None, None]

        blocks = (chunk.start + chunk.q.shape[2]) // width
        return attend_blocks(grouped, blocks, read, visible).reshape(chunk.q.shape).astype(chunk.q.dtype)


@dataclass(frozen=True)
class LongHeads(Method):
    """The present token chooses its chunks in every layer, at every step."""

    choice: ChunkChoice

    @property
    def axes(self):
        return Axes("chunk summaries", in_words(self.choice), "every-step, and in the prompt")

    @property
    def prefill(self) -> LongHeadsPrefill:
        """How its prompts have to be read."""
        return LongHeadsPrefill(self.choice)

    def begin(self, prefilled, *, implementation):
        return prefilled.prompts.seen(self.prefill)

    def attend(self, role, token, cache, state, handed, here):
        assert cache is not None
        memory = self._remember(state, token, cache, here)
        with jax.named_scope("attention/select"):
            chosen, lengths = self._choose(memory, token, here), here.lengths[:, None]
            standpoints = self.choice.standpoints(chosen, lengths)[:, :, 0]
            chunks = _numbers(chosen[:, :, 0], self.choice.entries // self.choice.chunk)
            seen_from = jnp.take_along_axis(standpoints, jnp.maximum(chunks, 0), axis=-1)
        slots = jnp.maximum(chunks, 0)[..., None] * self.choice.chunk + jnp.arange(self.choice.chunk)[None, None, None]
        visible = (chunks >= 0)[..., None] & (slots < here.lengths[:, None, None, None])
        with jax.named_scope("attention/selection"):
            output = attend_from(memory.config, token.bare_q, cache, jnp.where(visible, slots, -1), seen_from, here)
        positions = jnp.where(visible, slots, -1).reshape(*chunks.shape[:2], -1)
        # one summary per query head, and what goes into a new one
        scored = self._candidates(here) * memory.config.group * (memory.summaries.dtype.itemsize / cache.dtype.itemsize)
        scored += jnp.where(here.lengths % self.choice.chunk == 0, 2.0 * self.choice.chunk, 0.0)
        trace = selecting_trace(positions, scored, here)
        return Attended(output, memory, handed, trace, positions)

    def _candidates(self, here: Here) -> Int[Array, " batch"]:
        """How many chunks lie before the previous one."""
        return jnp.maximum((here.lengths - 1) // self.choice.chunk - 1, 0)

    def _choose(self, memory: ChunkMemory, token: Token, here: Here) -> Bool[Array, "batch kv_heads 1 chunks"]:
        summaries = memory.summaries[here.layer]
        candidates = self._candidates(here)
        scores = chunk_scores(token.bare_q, summaries, candidates, scale=1.0, implementation=here.implementation)
        batch, _, chunks = scores.shape
        scores = jnp.max(scores.reshape(batch, memory.config.kv_heads, -1, chunks), axis=2)
        return self.choice.choose(scores[:, :, None], here.lengths[:, None])

    def _remember(self, memory: ChunkMemory, token: Token, cache: KVCache, here: Here) -> ChunkMemory:
        """The memory with the present query, and with one more summary in rows whose chunk it completes."""
        width = self.choice.chunk
        rows = jnp.arange(here.lengths.shape[0])
        number, offset = (here.lengths - 1) // width, (here.lengths - 1) % width
        # past the end: the row writes nothing
        open_q = memory.open_q.at[here.layer, rows, :, jnp.where(here.active, offset, width)].set(token.q, mode="drop")
        complete = here.active & (offset == width - 1)

        def summary():
            slots = (number * width)[:, None] + jnp.arange(width)[None, :]
            k, v = (gather_slots(x, slots[:, None]) for x in (cache.keys(here.layer), cache.values(here.layer)))
            return summarise(memory.config, open_q[here.layer], k, v, number * width)

        # Only the new summaries leave the conditional: a branch that returned all of them would copy them.
        new = lax.cond(jnp.any(complete), summary, lambda: jnp.zeros(token.q.shape, jnp.float32))
        number = jnp.where(complete, number, memory.summaries.shape[3])
        summaries = memory.summaries.at[here.layer, rows, :, number].set(new, mode="drop")
        return ChunkMemory(summaries, open_q, memory.config)


def attend_from(
    config: LlamaConfig,
    bare_q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    slots: Int[Array, "batch kv_heads places chunk"],
    seen_from: Int[Array, "batch kv_heads places"],
    here: Here,
) -> Float[Array, "batch query_heads head_dim"]:
    """Attention of one query that sees the chunk in each place from another position; -1 in `slots` is none."""
    batch, kv_heads, places, width = slots.shape
    flat = slots.reshape(batch, kv_heads, -1)
    # A plain gather, which on TPU may copy the layer first; `gather_attention` takes one query per head, not per place.
    k, v = (gather_slots(x, flat) for x in (cache.keys(here.layer), cache.values(here.layer)))
    grouped = bare_q.reshape(batch, kv_heads, -1, 1, bare_q.shape[-1])
    q = jnp.broadcast_to(grouped, (*grouped.shape[:3], places, grouped.shape[-1]))
    q = turn(q, *rope.angles(config, seen_from.reshape(-1, places))).astype(k.dtype)
    k = k.reshape(batch, kv_heads, places, width, -1)
    logits = jnp.einsum("bngxd,bnxud->bngxu", q, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(*grouped.shape[:3], -1) * bare_q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where((flat >= 0)[:, :, None], logits, -jnp.inf), axis=-1)
    out = jnp.einsum("bngt,bntd->bngd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(bare_q.shape).astype(bare_q.dtype)


def turn(
    x: Float[Array, "batch kv_heads group queries head_dim"],
    cosine: Float[Array, "batch*kv_heads queries half"],
    sine: Float[Array, "batch*kv_heads queries half"],
) -> Float[Array, "batch kv_heads group queries head_dim"]:
    """Queries turned by angles that differ from kv head to kv head."""
    batch, kv_heads, group, queries, head_dim = x.shape
    return rope.rotate(x.reshape(batch * kv_heads, group, queries, head_dim), cosine, sine).reshape(x.shape)


def _numbers(chosen: Bool[Array, "batch kv_heads chunks"], places: int) -> Int[Array, "batch kv_heads places"]:
    """The chosen chunks ascending, -1 in places that are left over."""
    chunks = chosen.shape[-1]
    ascending = jnp.sort(jnp.where(chosen, jnp.arange(chunks)[None, None, :], chunks), axis=-1)[..., :places]
    ascending = jnp.pad(ascending, ((0, 0), (0, 0), (0, places - ascending.shape[-1])), constant_values=chunks)
    return jnp.where(ascending < chunks, ascending, -1)


def long_heads(k: int = 4096, chunk: int = 256, begin: int | None = None) -> Policy:
    """LongHeads: in every layer, every token reads the first, the previous and its own chunk of `chunk` tokens and the
    best others, `k` tokens in all, at positions below `k`: for contexts beyond a model's trained length, which `k` must
    not exceed. Up to `begin` tokens (default `k`) are read whole (Lu et al., arXiv 2402.10685)."""
    choice = ChunkChoice(k, chunk, k if begin is None else begin)
    return Policy("long-heads", LongHeads(choice), LongHeadsPrefill(choice))
