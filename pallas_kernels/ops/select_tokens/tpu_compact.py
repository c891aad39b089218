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
CHUNK = 8  # vector registers worked on at once
# A number of a word and a place in the list share an int32: 13 and 18 bits.
PLACE_BITS = 18
MAX_SLOTS = 1 << PLACE_BITS


def slots_of_bits(words: Int[Array, "blocks groups 8 128"], m: int) -> Int[Array, "rows {m}"]:
    """The set bits of every row as slots (`tpu_threshold` says how they stand), in order of words, then -1.

    No row has more than m. The rows are all of the blocks.
    """
    blocks, groups = words.shape[:2]
    places = pl.cdiv(m, LANES * CHUNK) * CHUNK
    room = CHUNK + max(pl.cdiv(groups, CHUNK) * CHUNK, places) + CHUNK
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
    used = pl.cdiv(groups, CHUNK) * CHUNK

    @pl.loop(0, word_ref.shape[0] // CHUNK)
    def _(chunk):
        word_ref[pl.ds(chunk * CHUNK, CHUNK)] = jnp.zeros((CHUNK, SUBLANES, LANES), jnp.int32)
        way_ref[pl.ds(chunk * CHUNK, CHUNK)] = jnp.zeros((CHUNK, SUBLANES, LANES), jnp.int32)

    total = _set_out(words_ref, word_ref, way_ref)
    for bit in range((groups * LANES - 1).bit_length()):
        _move_left(word_ref, way_ref, 1 << bit, PLACE_BITS + bit, used)
    _turn_round(word_ref, way_ref, places)
    for bit in reversed(range((m - 1).bit_length())):
        _move_right(word_ref, way_ref, 1 << bit, bit, places)
    _number(word_ref, way_ref, places)
    for bit in range(5):
        _fill(word_ref, way_ref, 1 << bit, places)

    @pl.loop(0, places)
    def _(place):
        entry = place * LANES + lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
        way = way_ref[CHUNK + place]
        bit = _nth_bit(word_ref[CHUNK + place], entry - (way & (MAX_SLOTS - 1)))
        number = way >> PLACE_BITS
        slot = (number >> 7) * (WORD * LANES) + bit * LANES + (number & (LANES - 1))
        slots_ref[:, pl.ds(pl.multiple_of(place * LANES, LANES), LANES)] = jnp.where(entry < total, slot, -1)


def _set_out(words_ref, word_ref, way_ref):
    """Words, and for those not empty the number of empty words before them (high) and of set bits (low)."""
    before = (
        lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) < lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    ).astype(jnp.bfloat16)
    # Small whole numbers: exact in bfloat16, and their sums in float32.
    ones = jnp.ones((LANES, LANES), jnp.bfloat16)

    def step(group, carry):
        word = words_ref[group]
        bits, empty = lax.population_count(word), (word == 0).astype(jnp.int32)
        both = jnp.concatenate([bits, empty]).astype(jnp.float32).astype(jnp.bfloat16)
        prefix = jnp.dot(both, before, preferred_element_type=jnp.float32).astype(jnp.int32) + carry
        word_ref[CHUNK + group] = word
        way_ref[CHUNK + group] = jnp.where(word == 0, 0, prefix[:SUBLANES] | (prefix[SUBLANES:] << PLACE_BITS))
        return carry + jnp.dot(both, ones, preferred_element_type=jnp.float32).astype(jnp.int32)

    carry = lax.fori_loop(0, words_ref.shape[0], step, jnp.zeros((2 * SUBLANES, LANES), jnp.int32))
    return carry[:SUBLANES]


def _lane() -> Int[Array, "1 8 128"]:
    return lax.broadcasted_iota(jnp.int32, (1, SUBLANES, LANES), 2)


def _moving(word, way, bit):
    moves = (way & (1 << bit)) != 0
    return (jnp.where(moves, word, 0), jnp.where(moves, way, 0)), (jnp.where(moves, 0, word), jnp.where(moves, 0, way))


def _move_left(word_ref, way_ref, distance, bit, used):
    registers, lanes = divmod(distance, LANES)

    @pl.loop(0, used // CHUNK)
    def _(chunk):
        at = CHUNK + chunk * CHUNK
        if lanes:
            source = pl.ds(at, CHUNK + 1)
            moving, staying = _moving(word_ref[source], way_ref[source], bit)
            rolled = [pltpu.roll(x, LANES - lanes, 2) for x in moving]
            arriving = [jnp.where(_lane() < LANES - lanes, x[:-1], x[1:]) for x in rolled]
            staying = [x[:-1] for x in staying]
        else:
            here = pl.ds(at, CHUNK)
            _, staying = _moving(word_ref[here], way_ref[here], bit)
            source = pl.ds(jnp.minimum(at + registers, CHUNK + used), CHUNK)
            arriving, _ = _moving(word_ref[source], way_ref[source], bit)
        word_ref[pl.ds(at, CHUNK)] = staying[0] | arriving[0]
        way_ref[pl.ds(at, CHUNK)] = staying[1] | arriving[1]


def _turn_round(word_ref, way_ref, places):
    """A word is now where it would be if all had one bit: on its way from here to the right it keeps its number."""

    @pl.loop(0, places)
    def _(place):
        here = place * LANES + lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
        way = way_ref[CHUNK + place]
        number, goal = here + (way >> PLACE_BITS), way & (MAX_SLOTS - 1)
        empty = word_ref[CHUNK + place] == 0
        way_ref[CHUNK + place] = jnp.where(empty, 0, (goal - here) | (number << PLACE_BITS))


def _move_right(word_ref, way_ref, distance, bit, places):
    registers, lanes = divmod(distance, LANES)

    @pl.loop(0, places // CHUNK)
    def _(chunk):
        at = places - chunk * CHUNK
        if lanes:
            source = pl.ds(at - 1, CHUNK + 1)
            moving, staying = _moving(word_ref[source], way_ref[source], bit)
            rolled = [pltpu.roll(x, lanes, 2) for x in moving]
            arriving = [jnp.where(_lane() >= lanes, x[1:], x[:-1]) for x in rolled]
            staying = [x[1:] for x in staying]
        else:
            here = pl.ds(at, CHUNK)
            _, staying = _moving(word_ref[here], way_ref[here], bit)
            source = pl.ds(jnp.maximum(at - registers, 0), CHUNK)
            arriving, _ = _moving(word_ref[source], way_ref[source], bit)
        word_ref[pl.ds(at, CHUNK)] = staying[0] | arriving[0]
        way_ref[pl.ds(at, CHUNK)] = staying[1] | arriving[1]


def _number(word_ref, way_ref, places):
    """All words have arrived: what remains to be known is where each one's entries begin, and its number."""

    @pl.loop(0, places)
    def _(place):
        here = place * LANES + lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
        number = way_ref[CHUNK + place] >> PLACE_BITS
        empty = word_ref[CHUNK + place] == 0
        way_ref[CHUNK + place] = jnp.where(empty, 0, here | (number << PLACE_BITS))


def _fill(word_ref, way_ref, distance, places):
    """Entries without a word copy from `distance` places before."""

    @pl.loop(0, places // CHUNK)
    def _(chunk):
        at = places - chunk * CHUNK
        source = pl.ds(at - 1, CHUNK + 1)
        word, way = word_ref[source], way_ref[source]
        empty = word[1:] == 0
        for ref, x in ((word_ref, word), (way_ref, way)):
            rolled = pltpu.roll(x, distance, 2)
            before = jnp.where(_lane() >= distance, rolled[1:], rolled[:-1])
            ref[pl.ds(at, CHUNK)] = jnp.where(empty, before, x[1:])


def _nth_bit(word: Int[Array, "8 128"], n: Int[Array, "8 128"]) -> Int[Array, "8 128"]:
    """Where bit number n of those that are set stands, both counted from 0: halving, by the count in the low half."""
    position = jnp.zeros_like(word)
    for half in (16, 8, 4, 2, 1):
        count = lax.population_count(word & ((1 << half) - 1))
        above = n >= count
        n = jnp.where(above, n - count, n)
        word = jnp.where(above, lax.shift_right_logical(word, half), word)
        position = jnp.where(above, position + half, position)
    return position
