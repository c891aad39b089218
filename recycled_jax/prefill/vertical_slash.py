"""MInference's vertical-slash pattern: what the last queries attend to, all of them read."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import KVCache
from recycled_jax.frame.prompt import PrefillAttention, PromptChunk
from recycled_jax.prefill.attention import attend_blocks, by_kv_head

_BLOCK = 512  # queries, and slots, that are multiplied at once


@dataclass(frozen=True)
class VerticalSlash(PrefillAttention):
    """Every query head reads `columns` slots, the first `sinks` among them, and of every token what stands at `slashes`
    distances before it, the nearest `recent` among them; chosen by the attention of the last `window` queries.

    The paper makes one pattern per prompt; that is what comes of prompts that are read in one chunk. Of several chunks,
    each has a pattern made by its own last queries, ours. The pattern is exact, where the paper's kernels read whole
    blocks around it; it comes as a mask, so the work is that of dense attention.

    Raises ValueError, naming the argument, for values that cannot be.
    """

    columns: int
    slashes: int
    window: int
    sinks: int
    recent: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 query")
        if self.slashes < 1 or self.recent < 1:
            raise ValueError(
                f"slashes={self.slashes} and recent={self.recent} must be at least 1: a token reads itself"
            )
        if not 0 <= self.sinks <= self.columns:
            raise ValueError(f"sinks={self.sinks} must be between 0 and columns={self.columns}")

    def attend(self, carried, handed, chunk, cache):
        with jax.named_scope("prefill/select"):
            columns, distances = self.pattern(chunk, cache)
        batch, query_heads, read, head_dim = chunk.q.shape
        rows, width = min(_BLOCK, read), min(_BLOCK, cache.capacity)
        padded = jnp.pad(chunk.q, ((0, 0), (0, 0), (0, -read % rows), (0, 0)))
        grouped = by_kv_head(padded, cache.kv_heads)
        columns, distances = (x.reshape(*grouped.shape[:3], -1) for x in (columns, distances))

        def attend_queries(number: Int[Array, ""]):
            here = lax.dynamic_slice_in_dim(grouped, number * rows, rows, axis=3)
            queries = (chunk.start + number * rows + jnp.arange(rows))[:, None]

            def first_slot(block):
                # A slice cannot run past the end: the last block may begin inside its predecessor.
                return jnp.minimum(block * width, cache.capacity - width)

            def read_block(block):
                k, v = cache.block(chunk.layer, first_slot(block), width)
                return here, k, v

            def visible(block):
                slots = (first_slot(block) + jnp.arange(width))[None, :]
                column = lax.dynamic_slice_in_dim(columns, first_slot(block), width, axis=3)
                slash = jnp.take(distances, jnp.maximum(queries - slots, 0), axis=3)
                return (column[..., None, :] | slash) & ((slots >= block * width) & (slots <= queries))[
                    None, None, None
                ]

            blocks = jnp.minimum(chunk.start + (number + 1) * rows, cache.capacity)
            return attend_blocks(here, (blocks + width - 1) // width, read_block, visible)

        out = lax.map(attend_queries, jnp.arange(padded.shape[2] // rows))
        out = jnp.moveaxis(out, 0, 3).reshape(batch, query_heads, -1, head_dim)
        return out[:, :, :read], carried, handed

    def pattern(
        self, chunk: PromptChunk, cache: KVCache
    ) -> tuple[Bool[Array, "batch query_heads capacity"], Bool[Array, "batch query_heads capacity"]]:
        """The slots, and the distances, that each query head reads."""
        batch, _, read, head_dim = chunk.q.shape
        slots = jnp.arange(cache.capacity)[None, None, None, :]
        ends = jnp.minimum(chunk.start + read, chunk.lengths)
        last = ends[:, None] - self.window + jnp.arange(self.window)[None, :]  # before the chunk: there is none
        columns = jnp.maximum(last - chunk.start, 0)[:, None, :, None]
        q = by_kv_head(jnp.take_along_axis(chunk.q, columns, axis=2, mode="clip"), cache.kv_heads)
        keys = cache.keys(chunk.layer)
        logits = jnp.einsum("bngtd,bnud->bngtu", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
        logits = logits.reshape(batch, -1, self.window, cache.capacity) * head_dim**-0.5
        before = jnp.maximum(last, 0)[:, None, :, None] - slots
        weights = jax.nn.softmax(jnp.where(before >= 0, logits, -jnp.inf), axis=-1)
        weights = jnp.where((last >= chunk.start)[:, None, :, None], weights, 0.0)
        # what stands at slot `before` of a query stands at its distance `slots`
        by_distance = jnp.take_along_axis(weights, jnp.maximum(before, 0), axis=3)
        by_distance = jnp.sum(jnp.where(before >= 0, by_distance, 0.0), axis=2)
        return (
            heaviest(jnp.sum(weights, axis=2), self.columns, self.sinks),
            heaviest(by_distance, self.slashes, self.recent),
        )


def heaviest(mass: Float[Array, "batch heads places"], count: int, first: int) -> Bool[Array, "batch heads places"]:
    """The `first` places and the heaviest others, `count` in all; of more first places than that, the nearest to 0."""
    forced = jnp.arange(mass.shape[-1])[None, None, :] < first
    _, best = lax.top_k(jnp.where(forced, jnp.inf, mass), min(count, mass.shape[-1]))
    return jnp.put_along_axis(jnp.zeros(mass.shape, bool), best, True, axis=-1, inplace=False)


def vertical_slash(
    columns: int = 1000, slashes: int = 6096, window: int = 64, sinks: int = 30, recent: int = 100
) -> VerticalSlash:
    """MInference's vertical-slash pattern: every query head reads the `columns` slots and the `slashes` distances to
    which the last `window` queries attend most (Jiang et al., arXiv 2407.02490)."""
    return VerticalSlash(columns, slashes, window, sinks, recent)
