"""gather_attention as a TPU kernel: tokens are fetched one by one and attended where they arrive, never stored.

A grid step takes a list of slots, in blocks. While a block is on its way the one before is attended: the scalar unit
issues DMAs in the same bundles in which the vector and matrix units work (`fetch`). With a list for each kv head, a
list's tokens are attended by all query heads, of which those of the list's head are kept: a fetch brings the whole
token anyway, and issuing it takes longer than the products.
"""

import functools

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
    units = fetch.units_per_token(cache)
    slots = fetch.in_blocks(positions, tokens)
    lists, blocks = batch * heads, slots.shape[2]

    out = pl.pallas_call(
        functools.partial(
            _kernel, tokens=tokens, blocks=blocks, units=units, mixed=cache.pack > 1 and heads > 1, scale=scale
        ),
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
            pltpu.VMEM((2, tokens * units, fetch.rows_per_unit(cache), lanes), cache.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SMEM((1, tokens), jnp.int32),
            pltpu.SemaphoreType.DMA,
            running_softmax.running(query_heads),
            pltpu.VMEM((query_heads, lanes), jnp.float32),
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


def _kernel(
    q,
    slots,
    first_units,
    kv,
    out,
    buffer,
    arrivals,
    first,
    arrival,
    state,
    sums,
    *,
    tokens,
    blocks,
    units,
    mixed,
    scale,
):
    this = pl.program_id(0)
    rows = units * buffer.shape[2] // 2
    running_softmax.start(state)
    sums[...] = jnp.zeros_like(sums)

    def fetch_units(block):
        fetch.start(first_units.at[this, block], first, arrival)

    def starts(slot):
        for entry in range(tokens):
            source = kv.at[pl.ds(first[0, entry], units)]
            destination = buffer.at[slot, pl.ds(entry * units, units)]
            yield functools.partial(fetch.start, source, destination, arrivals.at[slot])

    def attend(block, slot, in_use, ahead):
        def issue(share):
            """Starts as many DMAs for each token that is loaded, on average."""
            return lambda count: fetch.take(ahead, round(share * count))

        # In a row of several kv heads a query meets the keys of the others with zeros, and 0 x NaN is NaN.
        load_keys = fetch.reader(buffer, slot, units, after=issue(2 * SHARE_KEYS / units), finite=mixed)
        logits = scale * token_major.times_keys(q[0], load_keys, rows)
        fetch.take(ahead, round(SHARE_SOFTMAX * tokens))
        visible = (slots[0, pl.ds(block, 1), :] >= 0) & in_use
        weights, older = running_softmax.add_block(state, logits, visible)
        load = fetch.reader(buffer, slot, units, after=issue(2 * SHARE_VALUES / units))
        added = token_major.times_values(weights, lambda row: load(rows + row), rows)
        fetch.take(ahead)
        # Before the first block has arrived the buffer holds anything, NaN included.
        sums[...] = jnp.where(in_use, older * sums[...] + added, 0.0)

    fetch_units(0)

    @pl.loop(0, blocks)
    def _(block):
        slot = lax.rem(block, 2)
        fetch.wait(first, arrival)
        attend(jnp.maximum(block - 1, 0), 1 - slot, block > 0, starts(slot))
        fetch_units(jnp.minimum(block + 1, blocks - 1))
        fetch.wait(buffer.at[slot], arrivals.at[slot])

    fetch.wait(first, arrival)
    attend(blocks - 1, (blocks - 1) % 2, True, iter(()))
    out[0] = (sums[...] * running_softmax.normaliser(state.total[:, :1])).astype(out.dtype)
