"""page_scores as a TPU kernel: one pass over the bounds of the pages in use, a block of pages at a time.

The bounds lie in memory as a cache of tokens does, and a block of them is read in the same way.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops import token_major
from pallas_kernels.ops.chunk_scores.pallas_tpu import write_scores

BLOCK_BYTES = 4 * 2**20  # long enough to hide a step's fixed costs, short beside the VMEM


def page_scores(
    q: Float[Array, "batch query_heads head_dim"],
    bounds: KVCache,
    lengths: Int[Array, " batch"],
    *,
    page_size: int,
    layer: int | Int[Array, ""],
    group_reduction: str,
    scale: float,
    pages: int | None = None,
) -> Float[Array, "batch kv_heads pages"]:
    """As the operation; `pages` per block, or as many as `BLOCK_BYTES` hold."""
    bounds = token_major.require_token_major(bounds, "page_scores")
    expanded = token_major.expand_queries(q, bounds)
    batch, query_heads, lanes = expanded.shape
    pages = pages or token_major.block_tokens(bounds, BLOCK_BYTES)
    block = jax.ShapeDtypeStruct(token_major.block_shape(bounds, pages), bounds.dtype)
    scores = jax.ShapeDtypeStruct((batch, bounds.kv_heads, bounds.capacity), jnp.float32)
    scores_block = jax.ShapeDtypeStruct((1, bounds.kv_heads, pages), jnp.float32)
    counts = (lengths.astype(jnp.int32) + page_size - 1) // page_size
    return pl.pallas_call(
        functools.partial(_kernel, rows=bounds.kv.shape[4], scale=scale, group_reduction=group_reduction),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, pl.cdiv(bounds.capacity, pages)),
            in_specs=[
                pl.BlockSpec((1, query_heads, lanes), lambda row, step, *_: (row, 0, 0)),
                pl.BlockSpec(block.shape, functools.partial(token_major.block_in_use, pages)),
            ],
            out_specs=pl.BlockSpec(scores_block.shape, lambda row, step, *_: (row, 0, step)),
        ),
        out_shape=scores,
        name="page_scores",
        compiler_params=token_major.compiler_params("page_scores", blocks=[block, scores_block], scratch=[]),
    )(jnp.asarray(layer, jnp.int32).reshape(1), counts, expanded, token_major.stored(bounds))


def _kernel(layer, counts, q, bounds, scores, *, rows, scale, group_reduction):
    pages = bounds.shape[2]
    left = counts[pl.program_id(0)] - pl.program_id(1) * pages

    @pl.when(left <= 0)
    def _():
        scores[...] = jnp.full_like(scores, -jnp.inf)

    @pl.when(left > 0)
    def _():
        minima = functools.partial(token_major.load_row, bounds)
        logits = token_major.times_keys(jnp.minimum(q[0], 0), minima, rows)
        logits += token_major.times_keys(jnp.maximum(q[0], 0), lambda row: minima(rows + row), rows)
        write_scores(scores, logits, left, scale, group_reduction)
