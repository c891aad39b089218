"""gather_selection as a TPU kernel: of a token only the units are fetched that hold the head which asked for it.

A unit (`fetch`) holds a few kv heads, because rows of bfloat16 share words and narrow heads share rows: their number is
that of the copies in which a chunk of entries arrives, each with a token in every unit. A choice between the copies, by
row and lane, gives the chunk. One list for all kv heads takes whole tokens and leaves nothing to choose. While a chunk
is put together and written the next one arrives.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import KVCache, TokenMajor
from pallas_kernels.ops import fetch
from pallas_kernels.ops.token_major import require_token_major

FETCHES = 256  # in a chunk: enough to hide what a chunk costs once, few enough to write out one by one
MERGED = 64  # units put together at a time, so that they stay in registers


class Scratch(NamedTuple):
    """What a row of the batch needs; in a kernel, references."""

    copies: Any  # two chunks: [2, copies, entries, parts, units of a part, rows of a unit, lanes]
    copies_came: Any  # a semaphore for each
    tokens: Any  # [1, lists * entries]: which tokens a chunk takes, for the scalar unit
    tokens_came: Any
    slots: Any  # the same with empty entries, read where there are some
    slots_came: Any
    chunk: Any  # put together: [entries * units, rows of a unit, lanes]
    chunk_left: Any


def gather_selection(
    cache: KVCache,
    positions: Int[Array, "batch heads budget"],
    into: KVCache,
    *,
    layer: int | Int[Array, ""],
    rows: Bool[Array, " batch"] | None,
) -> KVCache:
    cache = require_token_major(cache, "gather_selection")
    batch, lists, budget = positions.shape
    entries = min(max(FETCHES // lists, 1), budget)
    per_unit, units, (head_rows, lanes) = fetch.rows_per_unit(cache), fetch.units_per_token(cache), cache.kv.shape[4:]
    if head_rows > 1 and head_rows % per_unit:
        raise NotImplementedError(f"gather_selection needs one row of heads or an even number of them, got {head_rows}")
    parts = min(units, 2)  # one unit alone holds keys and values
    copies = 1 if lists == 1 else min(per_unit, head_rows) * cache.pack
    slots = _in_chunks(positions.astype(jnp.int32), entries)
    row = jnp.asarray(layer, jnp.int32) * batch + jnp.arange(batch, dtype=jnp.int32)
    written = jnp.ones(batch, jnp.int32) if rows is None else rows.astype(jnp.int32)
    before = fetch.in_units(into)  # pyright: ignore[reportArgumentType]
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    after = pl.pallas_call(
        functools.partial(_kernel, budget=budget, lists=lists, pack=cache.pack),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch,),
            in_specs=[in_place] * 4,
            out_specs=in_place,
            scratch_shapes=[
                Scratch(
                    copies=pltpu.VMEM((2, copies, entries, parts, units // parts, per_unit, lanes), cache.dtype),
                    copies_came=pltpu.SemaphoreType.DMA((2,)),
                    tokens=pltpu.SMEM((1, lists * entries), jnp.int32),
                    tokens_came=pltpu.SemaphoreType.DMA,
                    slots=pltpu.SMEM((1, lists * entries), jnp.int32),
                    slots_came=pltpu.SemaphoreType.DMA,
                    chunk=pltpu.VMEM((entries * units, per_unit, lanes), cache.dtype),
                    chunk_left=pltpu.SemaphoreType.DMA,
                )
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(before.shape, before.dtype),
        input_output_aliases={6: 0},
        name="gather_selection",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
    )(
        written,
        row * budget * units,
        _ends_of_empty(slots, entries),
        slots,
        tokens_at(cache, slots, row),
        fetch.in_units(cache).reshape(-1, parts, units // parts, per_unit, lanes),
        before,
    )
    return TokenMajor(after.reshape(into.kv.shape), cache.pack)  # pyright: ignore[reportAttributeAccessIssue]


def _in_chunks(
    positions: Int[Array, "batch lists budget"], entries: int
) -> Int[Array, "batch chunks 1 entries_of_all_lists"]:
    """The entries of a chunk, list by list. The last chunk begins inside the one before it where they do not divide."""
    batch, lists, budget = positions.shape
    whole = budget // entries
    chunks = positions[:, :, : whole * entries].reshape(batch, lists, whole, entries).swapaxes(1, 2)
    if budget % entries:
        chunks = jnp.concatenate([chunks, positions[:, None, :, budget - entries :]], axis=1)
    return chunks.reshape(batch, -1, 1, lists * entries)


def _ends_of_empty(slots: Int[Array, "batch chunks 1 all"], entries: int) -> Int[Array, "batch chunks"]:
    """Behind the last entry of a chunk that is empty in any list; 0 where none is."""
    ends = jnp.arange(1, entries + 1, dtype=jnp.int32)[None, None, None, :]
    empty = slots.reshape(*slots.shape[:2], -1, entries) < 0
    return jnp.max(jnp.where(empty, ends, 0), axis=(2, 3))


def tokens_at(
    cache: TokenMajor, slots: Int[Array, "batch chunks 1 entries"], row: Int[Array, " batch"]
) -> Int[Array, "batch chunks 1 entries"]:
    """Tokens by their number in the whole stack, for rows by theirs; those in slot 0 where an entry is empty."""
    return row[:, None, None, None] * cache.capacity + jnp.clip(slots, 0, cache.capacity - 1)


def _kernel(written, first_unit, end_of_empty, slots, tokens, kv, into, out, scratch, *, budget, lists, pack):
    del into  # the same memory as `out`
    row, chunks = pl.program_id(0), tokens.shape[1]
    length = scratch.chunk.shape[0]
    entries = tokens.shape[3] // lists
    units = length // entries

    def read_tokens(chunk):
        fetch.start(tokens.at[row, chunk], scratch.tokens, scratch.tokens_came)

    def store(chunk, half):
        """Puts a chunk together and sends it off; the one before has left the buffer by then."""

        @pl.when(chunk > 0)
        def _():
            fetch.wait(scratch.chunk, scratch.chunk_left)

        _merge(scratch.copies, half, scratch.chunk, pack)

        end = end_of_empty[row, chunk]

        @pl.when(end > 0)
        def _():
            fetch.start(slots.at[row, chunk], scratch.slots, scratch.slots_came)
            fetch.wait(scratch.slots, scratch.slots_came)

        _clear(scratch, end, lists, pack)

        first = first_unit[row] + jnp.minimum(chunk * entries, budget - entries) * units
        fetch.start(scratch.chunk, out.at[pl.ds(first, length)], scratch.chunk_left)

    @pl.when(written[row] != 0)
    def _():
        read_tokens(0)

        @pl.loop(0, chunks)
        def _(chunk):
            half = lax.rem(chunk, 2)
            fetch.wait(scratch.tokens, scratch.tokens_came)
            for source, destination in _fetches(kv, scratch, half, entries, lists):
                fetch.start(source, destination, scratch.copies_came.at[half])

            @pl.when(chunk > 0)
            def _():
                store(chunk - 1, 1 - half)

            read_tokens(jnp.minimum(chunk + 1, chunks - 1))
            fetch.wait(scratch.copies.at[half], scratch.copies_came.at[half])

        fetch.wait(scratch.tokens, scratch.tokens_came)
        store(chunks - 1, (chunks - 1) % 2)
        fetch.wait(scratch.chunk, scratch.chunk_left)


def _fetches(kv, scratch, half, entries, lists) -> Iterator[tuple[Any, Any]]:
    """What comes from where for a chunk: for each entry and list a unit of the keys and one of the values."""
    copies = scratch.copies.shape[1]
    for entry in range(entries):
        for head in range(lists):
            token = scratch.tokens[0, head * entries + entry]
            if lists == 1:
                yield kv.at[token], scratch.copies.at[half, 0, entry]
            else:
                unit, copy = divmod(head, copies)
                yield kv.at[token, :, unit], scratch.copies.at[half, copy, entry, :, unit]


def _merge(copies, half, chunk, pack) -> None:
    """Of each copy the rows and lanes that were asked for."""
    count, (length, per_unit, lanes) = copies.shape[1], chunk.shape
    if dispatch.platform() != "tpu":  # the interpreter cannot read bfloat16 as words
        merged = copies[half, 0].reshape(chunk.shape)
        for copy in range(1, count):
            mine = _belongs(chunk.shape, copy, count, pack)
            merged = jnp.where(mine, copies[half, copy].reshape(chunk.shape), merged)
        chunk[...] = merged
        return
    source = copies.bitcast(jnp.uint32).reshape(2 * count * length, lanes)
    target = chunk.bitcast(jnp.uint32).reshape(length, lanes)
    for first in range(0, length, MERGED):
        size = min(MERGED, length - first)
        words = [source[pl.ds((half * count + copy) * length + first, size), :] for copy in range(count)]
        if count > 1:
            words = [x & _bits(size, lanes, per_unit, copy, count, pack) for copy, x in enumerate(words)]
        target[pl.ds(first, size), :] = functools.reduce(jnp.bitwise_or, words)


def _clear(scratch, end, lists, pack) -> None:
    """Zeros where an entry before `end` is empty."""
    _, count, entries, parts, units, per_unit, lanes = scratch.copies.shape
    length = scratch.chunk.shape[0]
    words = dispatch.platform() == "tpu"
    target = scratch.chunk.bitcast(jnp.uint32).reshape(length, lanes) if words else scratch.chunk

    def clear(entry, head):
        unit, copy = divmod(head, count)
        for part in range(parts):
            where = pl.ds((entry * parts + part) * units + unit, 1)
            if words:
                target[where] = target[where] & ~_bits(1, lanes, per_unit, copy, count, pack)
            else:
                mine = _belongs((1, per_unit, lanes), copy, count, pack)
                target[where] = jnp.where(mine, jnp.zeros_like(target[where]), target[where])

    @pl.loop(0, end)
    def _(entry):
        for head in range(lists):

            @pl.when(scratch.slots[0, head * entries + entry] < 0)
            def _(head=head):
                if lists == 1:
                    token = pl.ds(entry * parts * units, parts * units)
                    target[token] = jnp.zeros((parts * units, *target.shape[1:]), target.dtype)
                else:
                    clear(entry, head)


def _belongs(shape: tuple[int, ...], copy: int, copies: int, pack: int) -> jax.Array:
    """Where units [units, rows of a unit, lanes] hold the kv head that a copy is for."""
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    return (row % (copies // pack) == copy // pack) & (lane // (shape[2] // pack) == copy % pack)


def _bits(size: int, lanes: int, per_unit: int, copy: int, copies: int, pack: int) -> jax.Array:
    """The same for units as words [units, lanes]: all ones and zeros. The first row of two is the lower half."""
    ones = 0xFFFFFFFF if copies // pack < per_unit or per_unit == 1 else (0xFFFF << 16 * (copy // pack))
    lane = lax.broadcasted_iota(jnp.int32, (size, lanes), 1)
    return jnp.where(lane // (lanes // pack) == copy % pack, jnp.uint32(ones), jnp.uint32(0))
