"""CritiPrefill: segments of a prompt read only the blocks of earlier keys that bounds show to be critical to them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KVCache, prefill_attention
from recycled_jax.frame.prompt import PrefillAttention, PromptChunk
from recycled_jax.prefill.attention import attend_gathered, by_kv_head, gather_slots


@struct.dataclass
class KeyBounds:
    """The largest and the smallest entries of the keys in every block of slots."""

    largest: Float[Array, "layers batch kv_heads blocks head_dim"]
    smallest: Float[Array, "layers batch kv_heads blocks head_dim"]


@dataclass(frozen=True)
class CritiPrefill(PrefillAttention):
    """Segments of `segment` queries read themselves and the best `k` slots before them, in blocks of `block`, per kv
    head. Read densely are layer 0, segments that begin before slot `threshold`, and the one a prompt ends in.

    A segment's scores of the blocks are averaged with those of the layer below, whose share is `fusion`. They are kept
    as logarithms of probabilities: these are often 0 in float32, and blocks would be taken by number.

    Raises ValueError, naming the argument, for values that cannot be.
    """

    k: int
    segment: int
    block: int
    threshold: int
    fusion: float

    def __post_init__(self) -> None:
        for name in ("segment", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.segment % self.block:
            raise ValueError(f"segment={self.segment} must be a multiple of block={self.block}")
        if self.k < self.block:
            raise ValueError(f"k={self.k} is below block={self.block}: a segment reads whole blocks")
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold} must be at least 0")
        if not 0 <= self.fusion < 1:
            raise ValueError(f"fusion={self.fusion} must be at least 0 and below 1")

    def check(self, config, chunk):
        if chunk % self.segment:
            raise ValueError(
                f"prompts are read {chunk} tokens at a time, expected a multiple of segment={self.segment} "
                "(of criti-prefill)"
            )

    def start(self, config, *, batch, capacity, dtype):
        shape = (config.layers, batch, config.kv_heads, -(-capacity // self.block), config.head_dim)
        return KeyBounds(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def before_layers(self, config, *, batch, capacity, chunk):
        return jnp.zeros((batch, config.kv_heads, chunk // self.segment, -(-capacity // self.block)))

    def attend(self, carried, handed, chunk, cache):
        bounds = self.add_bounds(carried, chunk)
        with jax.named_scope("prefill/select"):
            scores = self.scores(chunk, bounds, handed)
        segments = [
            self._attend_segment(chunk, cache, number, scores[:, :, number]) for number in range(scores.shape[2])
        ]
        return jnp.concatenate(segments, axis=2), bounds, scores

    def add_bounds(self, bounds: KeyBounds, chunk: PromptChunk) -> KeyBounds:
        """With those of the chunk's blocks."""
        batch, kv_heads, read, head_dim = chunk.k.shape
        blocks = chunk.k.reshape(batch, kv_heads, read // self.block, self.block, head_dim)
        at = (chunk.layer, 0, 0, chunk.start // self.block, 0)

        def write(stack, found):
            return lax.dynamic_update_slice(stack, found[None].astype(stack.dtype), at)

        return KeyBounds(write(bounds.largest, blocks.max(axis=3)), write(bounds.smallest, blocks.min(axis=3)))

    def scores(
        self,
        chunk: PromptChunk,
        bounds: KeyBounds,
        below: Float[Array, "batch kv_heads segments blocks"],
    ) -> Float[Array, "batch kv_heads segments blocks"]:
        """The logarithm of each block's probability, -inf for those not before the segment."""
        batch, query_heads, read, head_dim = chunk.q.shape
        segments = chunk.q.reshape(batch, query_heads, read // self.segment, self.segment, head_dim)
        # the mean of the products with both bounds of the queries is the product with their mean
        middle = (segments.max(axis=3).astype(jnp.float32) + segments.min(axis=3).astype(jnp.float32)) / 2
        grouped = by_kv_head(middle, below.shape[1])
        products = [
            jnp.einsum("bngsd,bncd->bngsc", grouped, keys[chunk.layer].astype(jnp.float32))
            for keys in (bounds.largest, bounds.smallest)
        ]
        scores = jnp.mean(jnp.maximum(*products), axis=2)
        starts = chunk.start + self.segment * jnp.arange(read // self.segment)
        before = self.block * jnp.arange(below.shape[3])[None, :] < starts[:, None]
        # finite: the first segment has no block before it
        own = jax.nn.log_softmax(jnp.where(before[None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
        own = jnp.where(before[None, None], own, -jnp.inf)
        fused = jnp.logaddexp(below + jnp.log(self.fusion), own + jnp.log1p(-self.fusion))
        # the map of layer 0, which is dense, is not handed on
        return jnp.where(chunk.layer <= 1, own, fused)

    def _attend_segment(
        self, chunk: PromptChunk, cache: KVCache, number: int, scores: Float[Array, "batch kv_heads blocks"]
    ) -> Float[Array, "batch query_heads segment head_dim"]:
        columns = slice(number * self.segment, (number + 1) * self.segment)
        start = chunk.start + number * self.segment
        q, k, v = (heads[:, :, columns] for heads in (chunk.q, chunk.k, chunk.v))
        everything = (chunk.layer == 0) | (start < self.threshold) | (start + self.segment >= chunk.lengths)

        def dense():
            return prefill_attention(q, cache, start, layer=chunk.layer, implementation=chunk.implementation)

        def sparse():
            past = self._slots(scores)
            past_k, past_v = (gather_slots(x, past) for x in (cache.keys(chunk.layer), cache.values(chunk.layer)))
            causal = jnp.tril(jnp.ones((self.segment, self.segment), bool))[None, None]
            visible = jnp.concatenate(
                [
                    jnp.broadcast_to((past >= 0)[:, :, None], (*past.shape[:2], self.segment, past.shape[2])),
                    jnp.broadcast_to(causal, (*past.shape[:2], self.segment, self.segment)),
                ],
                axis=3,
            )
            keys = jnp.concatenate([past_k, k.astype(past_k.dtype)], axis=2)
            values = jnp.concatenate([past_v, v.astype(past_v.dtype)], axis=2)
            return attend_gathered(by_kv_head(q, cache.kv_heads), keys, values, visible).reshape(q.shape)

        def nothing():
            return jnp.zeros_like(q)

        from_all = lax.cond(jnp.any(everything), dense, nothing)
        from_some = lax.cond(jnp.all(everything), nothing, sparse)
        return jnp.where(everything[:, None, None, None], from_all, from_some)

    def _slots(self, scores: Float[Array, "batch kv_heads blocks"]) -> Int[Array, "batch kv_heads slots"]:
        """The slots of the best blocks, -1 where there are too few."""
        best, blocks = lax.top_k(scores, min(self.k // self.block, scores.shape[-1]))
        slots = blocks[..., None] * self.block + jnp.arange(self.block)[None, None, None, :]
        found: Bool[Array, "batch kv_heads best 1"] = (best > -jnp.inf)[..., None]
        return jnp.where(found, slots, -1).reshape(*scores.shape[:2], -1)


def criti_prefill(
    k: int = 2048, segment: int = 512, block: int = 32, threshold: int = 4096, fusion: float = 0.25
) -> CritiPrefill:
    """CritiPrefill: segments of `segment` queries read the `k` slots before them, in blocks of `block`, that bounds of
    queries and keys show to be critical, and themselves (Lv et al., arXiv 2409.12490)."""
    return CritiPrefill(k, segment, block, threshold, fusion)
