"""gather_selection as a TPU kernel: whole tokens are fetched, of each the row of heads that asked for it is kept.

The smallest piece of memory that a DMA can take out of a token-major cache is a token with all its heads. So an entry
whose heads chose different tokens costs a fetch per head, and a choice between the fetched tokens row by row. While
one chunk of entries is merged, the tokens of the next arrive.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from pallas_kernels.cache import KVCache, TokenMajor
from pallas_kernels.ops.token_major import require_token_major

CHUNK = 64  # entries at most
FETCHED_BYTES = 4 * 2**20  # of a chunk's tokens; two chunks are in VMEM
SCALAR_BYTES = 960 * 2**10  # of the 1 MiB of SMEM that every chip has
UNROLLED = 16  # fetches per turn of the loop that issues them


def gather_selection(
    cache: KVCache,
    positions: Int[Array, "batch kv_heads budget"],
    into: KVCache,
    *,
    layer: int | Int[Array, ""],
    rows: Bool[Array, " batch"] | None,
) -> KVCache:
    cache = require_token_major(cache, "gather_selection")
    batch, kv_heads, budget = positions.shape
    token = cache.kv.shape[3:]
    token_bytes = math.prod(token) * cache.dtype.itemsize
    chunk = min(CHUNK, budget, max(FETCHED_BYTES // (kv_heads * token_bytes), 1))
    if kv_heads > 32:
        raise NotImplementedError(f"positions has {kv_heads} kv heads; the kernel has one bit of a word for each: 32")
    if 2 * 4 * budget * (kv_heads + 1) > SCALAR_BYTES:
        raise NotImplementedError(
            f"positions has {budget} entries of {kv_heads} heads; SMEM has not room for them twice"
        )
    chunks = pl.cdiv(budget, chunk)
    # What the scalar unit reads, in the order in which it reads it: every operation there delays a fetch.
    tokens = (
        jnp.clip(positions, 0, cache.capacity - 1).astype(jnp.int32).swapaxes(1, 2).reshape(batch, 1, budget * kv_heads)
    )
    heads = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    empty = jnp.sum((positions < 0).astype(jnp.int32) << heads, axis=1)  # bit h of an entry: head h has none
    whole = empty[:, : (chunks - 1) * chunk].reshape(batch, chunks - 1, chunk)
    last = empty[:, None, budget - chunk :]  # may begin inside the chunk before it
    has_empty = jnp.any(jnp.concatenate([whole, last], axis=1) != 0, axis=2).astype(jnp.int32)
    written = jnp.ones(batch, jnp.int32) if rows is None else rows.astype(jnp.int32)
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    kv = pl.pallas_call(
        functools.partial(_kernel, pack=cache.pack, chunk=chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch,),
            in_specs=[
                pl.BlockSpec((1, 1, budget * kv_heads), lambda row, *_: (row, 0, 0), memory_space=pltpu.SMEM),
                pl.BlockSpec((1, 1, budget), lambda row, *_: (row, 0, 0), memory_space=pltpu.SMEM),
                in_place,
                in_place,
            ],
            out_specs=in_place,
            scratch_shapes=[
                pltpu.VMEM((2, kv_heads, chunk, *token), cache.dtype),
                pltpu.VMEM((chunk, *token), cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(into.kv.shape, into.dtype),  # pyright: ignore[reportAttributeAccessIssue]
        input_output_aliases={6: 0},
        name="gather_selection",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), disable_bounds_checks=True, vmem_limit_bytes=32 * 2**20
        ),
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        written,
        has_empty,
        tokens,
        empty[:, None, :],
        cache.kv,
        into.kv,  # pyright: ignore[reportAttributeAccessIssue]
    )
    return TokenMajor(kv, cache.pack)


def _kernel(layer, written, has_empty, tokens, empty, kv, into, out, fetched, merged, arrived, stored, *, pack, chunk):
    row = pl.program_id(0)
    kv_heads, budget = fetched.shape[1], empty.shape[2]
    chunks = pl.cdiv(budget, chunk)
    per_turn = math.gcd(chunk, max(UNROLLED // kv_heads, 1))

    def start_of(index):
        return jnp.minimum(index * chunk, budget - chunk)

    def fetch(index, slot):
        first = start_of(index) * kv_heads

        def one_turn(turn, _):
            for i in range(per_turn):
                entry = turn * per_turn + i
                for head in range(kv_heads):
                    token = token_of(tokens, first + turn * (per_turn * kv_heads) + (i * kv_heads + head))
                    pltpu.make_async_copy(
                        kv.at[layer[0], row, token], fetched.at[slot, head, entry], arrived.at[slot]
                    ).start()

        lax.fori_loop(0, chunk // per_turn, one_turn, None)

    def store(index):
        return pltpu.make_async_copy(merged, out.at[layer[0], row, pl.ds(start_of(index), chunk)], stored)

    @pl.when(written[row] != 0)
    def _():
        fetch(0, 0)

        @pl.loop(0, chunks)
        def _(index):
            slot = index & 1

            @pl.when(index + 1 < chunks)
            def _():
                fetch(index + 1, 1 - slot)

            wait_for_tokens(fetched, arrived, slot)

            @pl.when(index > 0)
            def _():
                store(index - 1).wait()

            _merge(fetched, slot, merged, pack)

            @pl.when(has_empty[row, index] != 0)
            def _():
                _clear_empty(empty, start_of(index), merged, pack)

            store(index).start()

        store(chunks - 1).wait()


def token_of(tokens, number):
    """The slot to fetch; the heads of an entry follow each other, then the next entry."""
    return tokens[0, 0, number]


def wait_for_tokens(fetched, arrived, slot):
    """One wait for all fetches of a chunk: a semaphore counts bytes, and these are as many."""
    pltpu.make_async_copy(fetched.at[slot], fetched.at[slot], arrived.at[slot]).wait()


def _merge(fetched, slot, merged, pack):
    chosen = fetched[slot, 0]
    for head in range(1, fetched.shape[1]):
        chosen = jnp.where(_head(chosen.shape, pack) == head, fetched[slot, head], chosen)
    merged[...] = chosen


def _clear_empty(empty, start, merged, pack):
    def entry(index, _):
        heads = empty[0, 0, start + index]

        @pl.when(heads != 0)
        def _():
            token = merged[index]
            merged[index] = jnp.where((heads >> _head(token.shape, pack)) & 1 == 1, jnp.zeros_like(token), token)

    lax.fori_loop(0, merged.shape[0], entry, None)


def _head(shape: tuple[int, ...], pack: int) -> jax.Array:
    """Which kv head every number of a token [..., 2, rows, lanes] belongs to."""
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (len(shape) - 2, len(shape) - 1))
    return row * pack + lane // (shape[-1] // pack)
