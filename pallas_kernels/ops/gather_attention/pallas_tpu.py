"""gather_attention as a TPU kernel: tokens are fetched one by one and attended where they arrive, never stored.

A grid step takes a list of slots, in blocks. While a block is on its way the one before is attended: the scalar unit
issues DMAs in the same bundles in which the vector and matrix units work (`fetch`). With a list for each kv head, a
list's tokens are attended by all query heads, of which those of the list's head are kept: a fetch brings the whole
token anyway, and issuing it takes longer than the products.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops import fetch, running_softmax, token_major

# Which share of a block's DMAs is issued between the loads of keys, during the softmax, and between the loads of
# values; the rest ends with the last product. Tried on the bundles of four chips.
SHARE_KEYS, SHARE_SOFTMAX, SHARE_VALUES = 0.4, 0.12, 0.3


class Scratch(NamedTuple):
    """What a list of slots needs; in a kernel, references."""

    tokens: Any  # two blocks: [2, tokens * units, rows of a unit, lanes]
    tokens_came: Any  # a semaphore for each
    units: Any  # [1, tokens]: where the tokens of a block begin, for the scalar unit
    units_came: Any
    softmax: running_softmax.Running
    sums: Any  # [query_heads, lanes] float32: weighted values so far


def gather_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    positions: Int[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    tokens: int | None = None,
) -> Float[Array, "batch query_heads head_dim"]:
    """As the operation; `tokens` per block, or `fetch.block_tokens`."""
    cache = token_major.require_token_major(cache, "gather_attention")
    expanded = token_major.expand_queries(q, cache)
    batch, query_heads, lanes = expanded.shape
    heads = positions.shape[1]
    tokens = tokens or fetch.block_tokens(cache, positions.shape[2])
    slots = fetch.in_blocks(positions, tokens)
    lists, blocks = batch * heads, slots.shape[2]
    block_shape = (2, tokens * fetch.units_per_token(cache), fetch.rows_per_unit(cache), lanes)
    out = pl.pallas_call(
        functools.partial(_kernel, rows=cache.kv.shape[4], mixed=cache.pack > 1 and heads > 1, scale=scale),
        grid=(lists,),
        in_specs=[
            pl.BlockSpec((1, query_heads, lanes), lambda i: (i // heads, 0, 0)),
            pl.BlockSpec((1, blocks, tokens), lambda i: (i, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((1, query_heads, lanes), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((lists, query_heads, lanes), q.dtype),
        scratch_shapes=[
            Scratch(
                tokens=pltpu.VMEM(block_shape, cache.dtype),
                tokens_came=pltpu.SemaphoreType.DMA((2,)),
                units=pltpu.SMEM((1, tokens), jnp.int32),
                units_came=pltpu.SemaphoreType.DMA,
                softmax=running_softmax.running(query_heads),
                sums=pltpu.VMEM((query_heads, lanes), jnp.float32),
            )
        ],
        name="gather_attention",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), disable_bounds_checks=True),
    )(
        expanded,
        slots.reshape(lists, blocks, tokens),
        fetch.first_units(cache, slots, layer).reshape(lists, blocks, 1, tokens),
        fetch.in_units(cache),
    )
    return token_major.collect_heads(_own(out.reshape(batch, heads, query_heads, lanes)), cache)


def _own(out: Float[Array, "batch heads query_heads lanes"]) -> Float[Array, "batch query_heads lanes"]:
    """Of each list the query heads that it is for."""
    batch, heads, query_heads, lanes = out.shape
    apart = out.reshape(batch, heads, heads, query_heads // heads, lanes)
    each = jnp.arange(heads)
    return apart[:, each, each].reshape(batch, query_heads, lanes)


def _kernel(q, slots, first_units, kv, out, scratch, *, rows, mixed, scale):
    this = pl.program_id(0)
    blocks = slots.shape[1]
    running_softmax.start(scratch.softmax)
    scratch.sums[...] = jnp.zeros(scratch.sums.shape, jnp.float32)

    def fetch_units(block):
        fetch.start(first_units.at[this, block], scratch.units, scratch.units_came)

    def attend(block, half, in_use, starts):
        _attend(q[0], slots[0, pl.ds(block, 1), :], half, in_use, starts, scratch, rows=rows, mixed=mixed, scale=scale)

    fetch_units(0)

    @pl.loop(0, blocks)
    def _(block):
        half = lax.rem(block, 2)
        fetch.wait(scratch.units, scratch.units_came)
        starts = fetch.starts(kv, scratch.units, scratch.tokens.at[half], scratch.tokens_came.at[half])
        attend(jnp.maximum(block - 1, 0), 1 - half, block > 0, starts)
        fetch_units(jnp.minimum(block + 1, blocks - 1))
        fetch.wait(scratch.tokens.at[half], scratch.tokens_came.at[half])

    fetch.wait(scratch.units, scratch.units_came)
    attend(blocks - 1, (blocks - 1) % 2, True, iter(()))
    out[0] = (scratch.sums[...] * running_softmax.normaliser(scratch.softmax.total[:, :1])).astype(out.dtype)


def _attend(q, slots, half, in_use, starts, scratch, *, rows, mixed, scale):
    """Takes in the block that is in a half of the buffer, if there is one, and starts DMAs on the way."""
    units, tokens = scratch.tokens.shape[1] // slots.shape[1], slots.shape[1]

    def reader(share, finite):
        per_token = share / (units / 2)  # keys are half the units, values the other

        def after(loaded):
            fetch.take(starts, round(per_token * loaded))

        return fetch.reader(scratch.tokens, half, units, after=after, finite=finite)

    # In a row of several kv heads a query meets the keys of the others with zeros, and 0 x NaN is NaN.
    logits = scale * token_major.times_keys(q, reader(SHARE_KEYS, finite=mixed), rows)
    fetch.take(starts, round(SHARE_SOFTMAX * tokens))
    weights, older = running_softmax.add_block(scratch.softmax, logits, (slots >= 0) & in_use)
    load = reader(SHARE_VALUES, finite=False)
    added = token_major.times_values(weights, lambda row: load(rows + row), rows)
    fetch.take(starts)
    # Before the first block has arrived the buffer holds anything, NaN included.
    scratch.sums[...] = jnp.where(in_use, older * scratch.sums[...] + added, 0.0)
