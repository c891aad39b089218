"""page_scores as a TPU kernel: one pass over the bounds of the pages in use, a block of pages at a time.

The bounds lie in memory as a cache of tokens does, and a block of them is read in the same way.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops import token_major

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
    # One product over twice the lanes: what is positive in q meets the maxima, what is negative the minima.
    expanded = jnp.concatenate([jnp.maximum(expanded, 0), jnp.minimum(expanded, 0)], axis=-1)
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
                pl.BlockSpec((1, query_heads, lanes), token_major.of_row),
                pl.BlockSpec(block.shape, functools.partial(token_major.block_in_use, pages)),
            ],
            out_specs=pl.BlockSpec(scores_block.shape, lambda row, step, *_: (row, 0, step)),
        ),
        out_shape=scores,
        name="page_scores",
        compiler_params=dataclasses.replace(
            token_major.compiler_params("page_scores", blocks=[block, scores_block], scratch=[]),
            # No block waits for another: two cores can share a row.
            dimension_semantics=("parallel", "parallel"),
        ),
    )(jnp.asarray(layer, jnp.int32).reshape(1), counts, expanded, token_major.stored(bounds))


def _kernel(layer, counts, q, bounds, scores, *, rows, scale, group_reduction):
    pages = bounds.shape[2]
    left = counts[pl.program_id(0)] - pl.program_id(1) * pages

    @pl.when(left <= 0)
    def _():
        scores[...] = jnp.full_like(scores, -jnp.inf)

    @pl.when(left > 0)
    def _():
        for first in range(0, pages, token_major.PIECE):
            some = slice(first, min(first + token_major.PIECE, pages))
            scores[0, :, some] = _scores_of(q, bounds, some, left, rows, scale, group_reduction, scores.shape[1])


def _scores_of(q, bounds, some, left, rows, scale, group_reduction, kv_heads):
    """Of some pages of a block, [kv_heads, pages]."""
    load = token_major.reader(bounds, some)
    logits = token_major.times_keys(q[0], lambda row: jnp.concatenate([load(rows + row), load(row)], axis=1), rows)
    of_groups = logits.reshape(kv_heads, -1, logits.shape[1])
    reduced = scale * getattr(jnp, group_reduction)(of_groups, axis=1)
    # Products with padding may be NaN: they are left out by a choice, and nothing was summed over pages.
    page = some.start + lax.broadcasted_iota(jnp.int32, reduced.shape, 1)
    return jnp.where(page < left, reduced, -jnp.inf)
