"""Second kernel of select_tokens on TPU: from one bit per slot to a list of slots.

A word with n bits set is to yield n entries of the list. So every word that is not empty travels to the entry where
its slots begin: first to the left over the empty words (by as many places as there are empty words before it), then
to the right (by as many as there are surplus bits before it). Either way goes by powers of two, one bit of the
distance at a time, lowest first to the left and highest first to the right; in this order no two words ever meet.
Then every entry that got no word copies the one before it, which is at most 31 entries away, and takes from it the
bit that is due.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

WORD = 32  # bits
LANES = 128
SUBLANES = 8
CHUNK = 16  # vector registers worked on at once
# A number of a word and a place in the list share an int32: 13 and 18 bits.
PLACE_BITS = 18
MAX_SLOTS = 1 << PLACE_BITS


def slots_of_bits(words: Int[Array, "blocks groups 8 128"], m: int) -> Int[Array, "rows {m}"]:
    """The set bits of every row as slots (`tpu_threshold` says how they stand), in order of words, then -1.

    No row has more than m. The rows are all of the blocks.
    """
    words = jnp.pad(words, ((0, 0), (0, -words.shape[1] % CHUNK), (0, 0), (0, 0)))
    blocks, groups = words.shape[:2]
    places = pl.cdiv(m, LANES * CHUNK) * CHUNK
    room = CHUNK + max(groups, places) + CHUNK
    slots = pl.pallas_call(
        functools.partial(_kernel, m=m),
        grid=(blocks,),
        in_specs=[pl.BlockSpec((None, groups, SUBLANES, LANES), lambda block: (block, 0, 0, 0))],
        out_specs=pl.BlockSpec((SUBLANES, places * LANES), lambda block: (block, 0)),
        out_shape=jax.ShapeDtypeStruct((blocks * SUBLANES, places * LANES), jnp.int32),
        scratch_shapes=[pltpu.VMEM((room, SUBLANES, LANES), jnp.int32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=48 * 2**20,
        ),
        name="select_compact",
    )(words)
    return slots[:, :m]


def _kernel(words_ref, slots_ref, word_ref, way_ref, *, m):
    groups, places = words_ref.shape[0], slots_ref.shape[1] // LANES

    @pl.loop(0, word_ref.shape[0] // CHUNK)
    def _(chunk):
        word_ref[pl.ds(chunk * CHUNK, CHUNK)] = jnp.zeros((CHUNK, SUBLANES, LANES), jnp.int32)
        way_ref[pl.ds(chunk * CHUNK, CHUNK)] = jnp.zeros((CHUNK, SUBLANES, LANES), jnp.int32)

    total = _set_out(words_ref, word_ref, way_ref)
    by_lanes = LANES.bit_length() - 1

    @pl.loop(0, by_lanes)
    def _(bit):
        _left_by_lanes(word_ref, way_ref, 1 << bit, PLACE_BITS + bit, groups)

    @pl.loop(0, (groups - 1).bit_length())
    def _(bit):
        _left_by_registers(word_ref, way_ref, 1 << bit, PLACE_BITS + by_lanes + bit, groups)

    _turn_round(word_ref, way_ref, places)
    register_bits = max((m - 1).bit_length() - by_lanes, 0)

    @pl.loop(0, register_bits)
    def _(step):
        bit = register_bits - 1 - step
        _right_by_registers(word_ref, way_ref, 1 << bit, by_lanes + bit, places)

    @pl.loop(0, by_lanes)
    def _(step):
        bit = by_lanes - 1 - step
        _right_by_lanes(word_ref, way_ref, 1 << bit, bit, places)

    _number(word_ref, way_ref, places)

    @pl.loop(0, WORD.bit_length() - 1)
    def _(bit):
        _fill(word_ref, way_ref, 1 << bit, places)

    @pl.loop(0, places // CHUNK)
    def _(chunk):
        here = pl.ds(CHUNK + chunk * CHUNK, CHUNK)
        way, entry = way_ref[here], _entry(chunk)
        bit = _nth_bit(word_ref[here], entry - (way & (MAX_SLOTS - 1)))
        number = way >> PLACE_BITS
        slot = (number >> 7) * (WORD * LANES) + bit * LANES + (number & (LANES - 1))
        slot = jnp.where(entry < total[None], slot, -1)
        slots_ref[:, pl.ds(pl.multiple_of(chunk * CHUNK * LANES, LANES), CHUNK * LANES)] = jnp.concatenate(
            [slot[i] for i in range(CHUNK)], axis=1
        )


def _entry(chunk: Int[Array, ""]) -> Int[Array, "chunk 8 128"]:
    """The places of a chunk, as entries of the list."""
    shape = (CHUNK, SUBLANES, LANES)
    return (chunk * CHUNK + lax.broadcasted_iota(jnp.int32, shape, 0)) * LANES + lax.broadcasted_iota(
        jnp.int32, shape, 2
    )


def _set_out(words_ref, word_ref, way_ref):
    """Words, and for those not empty the number of empty words before them (high) and of set bits (low)."""
    before = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) < lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    # Small whole numbers: exact in bfloat16, and their sums in float32.
    before, all_lanes = before.astype(jnp.bfloat16), jnp.ones((LANES, LANES), jnp.bfloat16)

    def step(chunk, carry):
        word = words_ref[pl.ds(chunk * CHUNK, CHUNK)]
        counts = jnp.concatenate([lax.population_count(word), (word == 0).astype(jnp.int32)], axis=1)
        counts = counts.astype(jnp.float32).astype(jnp.bfloat16).reshape(CHUNK * 2 * SUBLANES, LANES)
        prefixes = jnp.dot(counts, before, preferred_element_type=jnp.float32).reshape(CHUNK, 2 * SUBLANES, LANES)
        totals = jnp.dot(counts, all_lanes, preferred_element_type=jnp.float32).reshape(CHUNK, 2 * SUBLANES, LANES)
        ways = []
        for i in range(CHUNK):
            prefix = (carry + prefixes[i]).astype(jnp.int32)
            carry += totals[i]
            ways.append(prefix[:SUBLANES] | (prefix[SUBLANES:] << PLACE_BITS))
        here = pl.ds(CHUNK + chunk * CHUNK, CHUNK)
        word_ref[here] = word
        way_ref[here] = jnp.where(word == 0, 0, jnp.stack(ways))
        return carry

    chunks = words_ref.shape[0] // CHUNK
    carry = lax.fori_loop(0, chunks, step, jnp.zeros((2 * SUBLANES, LANES), jnp.float32))
    return carry[:SUBLANES].astype(jnp.int32)


def _lane() -> Int[Array, "1 8 128"]:
    return lax.broadcasted_iota(jnp.int32, (1, SUBLANES, LANES), 2)


def _roll(x: Int[Array, "registers 8 128"], lanes: int | Int[Array, ""]) -> Int[Array, "registers 8 128"]:
    """To the right, every register for itself."""
    return pltpu.roll(x, lanes, 2)


def _moving(word, way, bit):
    moves = (way & (1 << bit)) != 0
    return (jnp.where(moves, word, 0), jnp.where(moves, way, 0)), (jnp.where(moves, 0, word), jnp.where(moves, 0, way))


def _left_by_lanes(word_ref, way_ref, lanes, bit, used):
    @pl.loop(0, used // CHUNK)
    def _(chunk):
        at = CHUNK + chunk * CHUNK
        moving, staying = _moving(word_ref[pl.ds(at, CHUNK + 1)], way_ref[pl.ds(at, CHUNK + 1)], bit)
        for ref, moves, stays in zip((word_ref, way_ref), moving, staying, strict=True):
            rolled = _roll(moves, LANES - lanes)
            ref[pl.ds(at, CHUNK)] = stays[:-1] | jnp.where(_lane() < LANES - lanes, rolled[:-1], rolled[1:])


def _left_by_registers(word_ref, way_ref, registers, bit, used):
    @pl.loop(0, used // CHUNK)
    def _(chunk):
        at = CHUNK + chunk * CHUNK
        _, staying = _moving(word_ref[pl.ds(at, CHUNK)], way_ref[pl.ds(at, CHUNK)], bit)
        source = pl.ds(jnp.minimum(at + registers, CHUNK + used), CHUNK)  # there is nothing behind
        moving, _ = _moving(word_ref[source], way_ref[source], bit)
        for ref, moves, stays in zip((word_ref, way_ref), moving, staying, strict=True):
            ref[pl.ds(at, CHUNK)] = stays | moves


def _turn_round(word_ref, way_ref, places):
    """A word is now where it would be if all had one bit: on its way from here to the right it keeps its number."""

    @pl.loop(0, places // CHUNK)
    def _(chunk):
        at, here = pl.ds(CHUNK + chunk * CHUNK, CHUNK), _entry(chunk)
        way = way_ref[at]
        number, goal = here + (way >> PLACE_BITS), way & (MAX_SLOTS - 1)
        way_ref[at] = jnp.where(word_ref[at] == 0, 0, (goal - here) | (number << PLACE_BITS))


def _right_by_lanes(word_ref, way_ref, lanes, bit, places):
    @pl.loop(0, places // CHUNK)
    def _(chunk):
        at = places - chunk * CHUNK
        moving, staying = _moving(word_ref[pl.ds(at - 1, CHUNK + 1)], way_ref[pl.ds(at - 1, CHUNK + 1)], bit)
        for ref, moves, stays in zip((word_ref, way_ref), moving, staying, strict=True):
            rolled = _roll(moves, lanes)
            ref[pl.ds(at, CHUNK)] = stays[1:] | jnp.where(_lane() >= lanes, rolled[1:], rolled[:-1])


def _right_by_registers(word_ref, way_ref, registers, bit, places):
    @pl.loop(0, places // CHUNK)
    def _(chunk):
        at = places - chunk * CHUNK
        _, staying = _moving(word_ref[pl.ds(at, CHUNK)], way_ref[pl.ds(at, CHUNK)], bit)
        source = pl.ds(jnp.maximum(at - registers, 0), CHUNK)  # there is nothing before
        moving, _ = _moving(word_ref[source], way_ref[source], bit)
        for ref, moves, stays in zip((word_ref, way_ref), moving, staying, strict=True):
            ref[pl.ds(at, CHUNK)] = stays | moves


def _number(word_ref, way_ref, places):
    """All words have arrived: what remains to be known is where each one's entries begin, and its number."""

    @pl.loop(0, places // CHUNK)
    def _(chunk):
        at = pl.ds(CHUNK + chunk * CHUNK, CHUNK)
        way = _entry(chunk) | (way_ref[at] >> PLACE_BITS << PLACE_BITS)
        way_ref[at] = jnp.where(word_ref[at] == 0, 0, way)


def _fill(word_ref, way_ref, distance, places):
    """Entries without a word copy from `distance` places before."""

    @pl.loop(0, places // CHUNK)
    def _(chunk):
        at = places - chunk * CHUNK
        source = pl.ds(at - 1, CHUNK + 1)
        word, way = word_ref[source], way_ref[source]
        empty = word[1:] == 0
        for ref, x in ((word_ref, word), (way_ref, way)):
            rolled = _roll(x, distance)
            before = jnp.where(_lane() >= distance, rolled[1:], rolled[:-1])
            ref[pl.ds(at, CHUNK)] = jnp.where(empty, before, x[1:])


def _nth_bit(word: Int[Array, "chunk 8 128"], n: Int[Array, "chunk 8 128"]) -> Int[Array, "chunk 8 128"]:
    """Where bit number n of those that are set stands, both counted from 0: halving, by the count in the low half."""
    position = jnp.zeros_like(word)
    for half in (16, 8, 4, 2, 1):
        count = lax.population_count(word & ((1 << half) - 1))
        above = n >= count
        n = jnp.where(above, n - count, n)
        word = jnp.where(above, lax.shift_right_logical(word, half), word)
        position = jnp.where(above, position + half, position)
    return position
