"""Fetching tokens one by one from a `TokenMajor` cache: what the kernels over selections share.

A DMA is issued by the scalar unit, which has two slots in a bundle: the DMA takes both, so what it costs is one bundle
and half a bundle for every scalar operation that works out its addresses. Hence the cache is viewed in *units*, rows of
32-bit words (512 bytes: one float32 row, or two bfloat16 rows that share their words), and a token is named by its
first unit: that number is added to the base address as it is. Slots are turned into units outside the kernel, by the
vector unit; a block's units are copied to scalar memory at fixed addresses; one wait covers a block's bytes. So a DMA
takes five scalar operations and 3.5 bundles.

Where an entry is empty, slot 0 is fetched: a fetch costs less than the branch around it.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import TokenMajor
from pallas_kernels.ops.token_major import SUBLANES, row_of_words

View = Any  # a reference or a part of one

WORD = 4  # bytes
LARGEST_BLOCK = 256  # tokens: enough to hide what a block costs once, few enough to write out DMA by DMA
BLOCK_BYTES = 2 * 2**20
PIECE = 32  # tokens loaded at a time


def rows_per_unit(cache: TokenMajor) -> int:
    """Rows of `lanes` that share 32-bit words."""
    return WORD // cache.dtype.itemsize


def units_per_token(cache: TokenMajor) -> int:
    """Keys come first, then values."""
    return 2 * cache.kv.shape[4] // rows_per_unit(cache)


def in_units(cache: TokenMajor) -> jax.Array:
    """The whole stack as [units, rows of a unit, lanes], a view.

    Raises:
        NotImplementedError: on TPU the tiles of the cache are padded, so it would be copied.
    """
    rows, lanes = cache.kv.shape[4:]
    if dispatch.platform() == "tpu" and rows > SUBLANES and rows % SUBLANES:
        raise NotImplementedError(
            f"fetching tokens on TPU needs at most {SUBLANES} rows of heads or a multiple of {SUBLANES}, got {rows}"
        )
    return cache.kv.reshape(-1, rows_per_unit(cache), lanes)


def block_tokens(cache: TokenMajor, budget: int) -> int:
    """Tokens per block: whole tiles of sublanes."""
    fit = BLOCK_BYTES // (units_per_token(cache) * WORD * cache.kv.shape[5])
    most = max(min(fit, LARGEST_BLOCK) // SUBLANES, 1) * SUBLANES
    return min(most, pl.cdiv(budget, SUBLANES) * SUBLANES)


def in_blocks(positions: Int[Array, "batch heads budget"], tokens: int) -> Int[Array, "batch heads blocks {tokens}"]:
    """The slots block by block; the last block is filled up with empty entries."""
    batch, heads, budget = positions.shape
    blocks = pl.cdiv(budget, tokens)
    widths = ((0, 0), (0, 0), (0, blocks * tokens - budget))
    filled = jnp.pad(positions.astype(jnp.int32), widths, constant_values=-1)
    return filled.reshape(batch, heads, blocks, tokens)


def first_units(
    cache: TokenMajor, slots: Int[Array, "batch heads blocks tokens"], layer: int | Int[Array, ""]
) -> Int[Array, "batch heads blocks tokens"]:
    """Where in `in_units` the tokens in these slots of a layer begin; those in slot 0 where an entry is empty.

    An int32 counts the units of 1 TiB, more than a device has.
    """
    row = layer * cache.batch + jnp.arange(cache.batch, dtype=jnp.int32)
    token = row[:, None, None, None] * cache.capacity + jnp.clip(slots, 0, cache.capacity - 1)
    return token * units_per_token(cache)


def start(source: View, destination: View, semaphore: View) -> None:
    pltpu.make_async_copy(source, destination, semaphore).start()


def wait(destination: View, semaphore: View) -> None:
    """Until as many bytes have arrived as the destination has: those of one copy or of many."""
    pltpu.make_async_copy(destination, destination, semaphore).wait()


def starts(kv: View, first_units: View, destination: View, semaphore: View) -> Iterator[Callable[[], None]]:
    """For each token of a block what starts its DMA, from `in_units` to [tokens * units, rows of a unit, lanes]."""
    tokens = first_units.shape[1]
    units = destination.shape[0] // tokens
    for token in range(tokens):
        source = kv.at[pl.ds(first_units[0, token], units)]
        yield functools.partial(start, source, destination.at[pl.ds(token * units, units)], semaphore)


def take(starts: Iterator[Callable[[], None]], count: int | None = None) -> None:
    """Calls the next `count`, or all that are left."""
    for one in itertools.islice(starts, count):
        one()


def reader(
    buffer: jax.Ref, slot: int | jax.Array, units: int, *, after: Callable[[int], None], finite: bool = False
) -> Callable[[int], jax.Array]:
    """Loads row r of heads of the tokens in a slot of `buffer` [slots, tokens * units, rows of a unit, lanes].

    As `token_major.reader`, [tokens, lanes] with the values' rows behind the keys', but for a buffer in units. After
    each load from memory `after` is called with its number of tokens; in all that is `tokens` for each unit. The
    compiler keeps loads and DMAs of one buffer in the order of the program and moves everything else, so DMAs that
    `after` starts fill the bundles in which the vector and matrix units work on what was loaded.
    """
    _, length, per_unit, lanes = buffer.shape
    tokens = length // units

    def interpreted(row: int) -> jax.Array:  # the interpreter cannot read bfloat16 as words
        x = buffer[slot].reshape(tokens, units * per_unit, lanes)[:, row]
        if row % per_unit == 0:
            after(tokens)
        return jnp.where(jnp.isfinite(x), x, 0) if finite else x

    if dispatch.platform() != "tpu":
        return interpreted

    typed: Any = buffer
    if per_unit == 2:
        typed = typed.bitcast(jnp.uint32)
    flat = typed.reshape(buffer.shape[0] * length, lanes)

    @functools.cache
    def words(unit: int) -> jax.Array:
        pieces = []
        for token in range(0, tokens, PIECE):
            count = min(PIECE, tokens - token)
            first = slot * length + token * units + unit
            pieces.append(flat[pl.ds(first, count, units if units > 1 else None), :])
            after(count)
        return jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def load(row: int) -> jax.Array:
        x = words(row // per_unit)
        if per_unit == 2:
            x = row_of_words(x, row)
        if finite:
            x = jnp.where(jnp.isfinite(x), x, 0)
        return x.astype(buffer.dtype)

    return load
