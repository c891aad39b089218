"""chunk_scores as a TPU kernel: one pass over the vectors of the chunks in use, a block of chunks of all heads at a time.

A vector takes whole tiles of memory, 128 lanes: head_dim 64 reads twice what it holds.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import LANES
from pallas_kernels.ops import token_major

BLOCK_BYTES = 2**20  # 512 chunks of 8 heads in bfloat16; a row has few more, and the first block is waited for


def chunk_scores(
    q: Float[Array, "batch query_heads head_dim"],
    chunks: Float[Array, "batch kv_heads chunks head_dim"],
    counts: Int[Array, " batch"],
    *,
    group_reduction: str,
    scale: float,
    size: int | None = None,
) -> Float[Array, "batch kv_heads chunks"]:
    """As the operation; `size` chunks per block, or as many as `BLOCK_BYTES` hold."""
    if chunks.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"chunk_scores on TPU needs bfloat16 or float32 chunks, got {chunks.dtype}")
    batch, kv_heads, count, head_dim = chunks.shape
    size = size or block_chunks(kv_heads, count, head_dim, chunks.dtype)
    # In VMEM, and as VMEM is counted, the lanes of a vector are whole tiles.
    held = jax.ShapeDtypeStruct((kv_heads, size, pl.cdiv(head_dim, LANES) * LANES), chunks.dtype)
    scores = jax.ShapeDtypeStruct((1, kv_heads, size), jnp.float32)

    def in_use(row, step, counts):
        """Past a row's chunks its last block in use, again: a block that is there already is not fetched."""
        return row, 0, jnp.minimum(step, jnp.maximum(counts[row] - 1, 0) // size), 0

    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, group_reduction=group_reduction),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(count, size)),
            in_specs=[
                pl.BlockSpec((1, *q.shape[1:]), lambda row, step, _: (row, 0, 0)),
                pl.BlockSpec((1, kv_heads, size, head_dim), in_use),
            ],
            out_specs=pl.BlockSpec(scores.shape, lambda row, step, _: (row, 0, step)),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, count), jnp.float32),
        name="chunk_scores",
        compiler_params=token_major.compiler_params("chunk_scores", blocks=[held, scores], scratch=[]),
    )(counts.astype(jnp.int32), q.astype(chunks.dtype), chunks)


def block_chunks(kv_heads: int, count: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Chunks per block: all of them, or as many as fit `BLOCK_BYTES` in whole tiles of lanes."""
    bytes_per_chunk = kv_heads * pl.cdiv(head_dim, LANES) * LANES * dtype.itemsize
    return min(count, max(BLOCK_BYTES // bytes_per_chunk // LANES, 1) * LANES)


def _kernel(counts, q, chunks, scores, *, scale, group_reduction):
    left = counts[pl.program_id(0)] - pl.program_id(1) * scores.shape[2]

    @pl.when(left <= 0)
    def _():
        scores[...] = jnp.full_like(scores, -jnp.inf)

    @pl.when(left > 0)
    def _():
        logits = token_major.times_keys(q[0], lambda head: chunks[0, head], chunks.shape[1])
        write_scores(scores, logits, left, scale, group_reduction)


def write_scores(scores: jax.Ref, logits: jax.Array, left: jax.Array, scale: float, group_reduction: str) -> None:
    """Products [query_heads, slots], scaled and reduced over each group, to [1, kv_heads, slots]; -inf from `left` on.

    A product there may be NaN: it is left out by a choice, and no product is summed with one of another slot.
    """
    _, kv_heads, slots = scores.shape
    reduced = scale * getattr(jnp, group_reduction)(logits.reshape(kv_heads, -1, slots), axis=1)
    slot = lax.broadcasted_iota(jnp.int32, reduced.shape, 1)
    scores[0] = jnp.where(slot < left, reduced, -jnp.inf)
