"""chunk_scores as a TPU kernel: one pass over the vectors of the chunks in use, a block of chunks at a time.

XLA lays an array out so that its tiles of 128 lanes are full: vectors of 128 channels lie along the lanes, of shorter
ones the chunks do. The kernel takes either as it lies (swapping the axes of the array is then no work), where asking
for channels along the lanes would write a copy of twice the bytes at every step.
"""

import dataclasses
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
    across = bool(head_dim % LANES)  # the channels of a vector lie across the lanes, not along them
    vectors = jnp.swapaxes(chunks, 2, 3) if across else chunks
    shape = (1, kv_heads, head_dim, size) if across else (1, kv_heads, size, head_dim)
    block = jax.ShapeDtypeStruct(shape, chunks.dtype)
    scores = jax.ShapeDtypeStruct((1, kv_heads, size), jnp.float32)

    return pl.pallas_call(
        functools.partial(_kernel, across=across, scale=scale, group_reduction=group_reduction),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(count, size)),
            in_specs=[
                pl.BlockSpec((1, *q.shape[1:]), token_major.of_row),
                pl.BlockSpec(block.shape, functools.partial(_block_in_use, size, across)),
            ],
            out_specs=pl.BlockSpec(scores.shape, lambda row, step, _: (row, 0, step)),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, count), jnp.float32),
        name="chunk_scores",
        compiler_params=dataclasses.replace(
            token_major.compiler_params("chunk_scores", blocks=[block, scores], scratch=[]),
            # No block waits for another: two cores can share a row.
            dimension_semantics=("parallel", "parallel"),
        ),
    )(counts.astype(jnp.int32), q.astype(chunks.dtype), vectors)


def block_chunks(kv_heads: int, count: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Chunks per block: all of them, or as many as fit `BLOCK_BYTES` in whole tiles of lanes."""
    bytes_per_chunk = kv_heads * head_dim * dtype.itemsize
    return min(count, max(BLOCK_BYTES // bytes_per_chunk // LANES, 1) * LANES)


def _block_in_use(size: int, across: bool, row: jax.Array, step: jax.Array, counts: jax.Ref) -> tuple:
    """Index map: past a row's chunks its last block in use, again; a block that is there already is not fetched."""
    block = jnp.minimum(step, jnp.maximum(counts[row] - 1, 0) // size)
    return (row, 0, 0, block) if across else (row, 0, block, 0)


def _kernel(counts, q, vectors, scores, *, across, scale, group_reduction):
    left = counts[pl.program_id(0)] - pl.program_id(1) * scores.shape[2]

    @pl.when(left <= 0)
    def _():
        scores[...] = jnp.full_like(scores, -jnp.inf)

    @pl.when(left > 0)
    def _():
        group = q.shape[1] // scores.shape[1]
        channels = (((1,), (0 if across else 1,)), ((), ()))
        precision = lax.Precision.HIGHEST if vectors.dtype == jnp.float32 else None
        reduced = []
        for head in range(scores.shape[1]):
            queries = q[0, head * group : (head + 1) * group]
            products = lax.dot_general(
                queries, vectors[0, head], channels, precision=precision, preferred_element_type=jnp.float32
            )
            reduced.append(getattr(jnp, group_reduction)(products, axis=0, keepdims=True))
        # Products with padding may be NaN: they are left out by a choice, and nothing was summed over chunks.
        chunk = lax.broadcasted_iota(jnp.int32, scores.shape[1:], 1)
        scores[0] = jnp.where(chunk < left, scale * jnp.concatenate(reduced), -jnp.inf)
