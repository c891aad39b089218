"""First kernel of select_tokens on TPU: which slots are chosen, as one bit per slot.

The m strongest of a row are found by radix selection, digit by digit of the key, the highest first: of the slots
still open, the larger digits are chosen as long as there is need for all of them, the digit with which there would
be too many stays open, and the smaller ones are out. Counting in 32-bit keys would touch every key at every digit.
So the keys are first turned into bit planes: a word of plane p holds bit p of 32 keys, and the search is a few
logical operations and population counts on a 32nd of the data. Digits have two bits, because a sum over lanes
takes as long as the counting. Equal keys are told apart by more planes below: the bits of the slot's number, inverted
as the lower slot goes first.

Slots stand in groups of 4096: `slot = 4096 group + 128 bit + lane`, so that the 32 vector registers of a group
become the 32 words of its planes. A row takes one sublane, or `split` of them if there are fewer than 8 rows;
sublane j then holds groups `j groups` to `(j + 1) groups - 1`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

WORD = 32  # bits
LANES = 128
SUBLANES = 8
GROUP = WORD * LANES  # slots
CHUNK = 8  # groups worked on at once
# In every run of 2^(b+1) bits the lower 2^b: where bit b of a bit's number is 0.
LOWER_BITS = (0x55555555, 0x33333333, 0x0F0F0F0F, 0x00FF00FF, 0x0000FFFF)


def chosen_bits(
    keys: Float[Array, "rows tokens"] | Int[Array, "rows tokens"],
    begin: int,
    end: Int[Array, " rows"],
    m: int,
) -> Int[Array, "blocks groups 8 128"]:
    """Of slots begin..end-1 of every row the m with the largest keys (all, if there are fewer), lower slots first.

    Rows stand in blocks of 8, the last one filled up with rows of which nothing is chosen.
    """
    rows, tokens = keys.shape
    split = 1
    while 2 * split * rows <= SUBLANES and 2 * split * GROUP <= tokens:
        split *= 2
    groups = pl.cdiv(tokens, GROUP * split)
    step = min(CHUNK, groups)  # groups per grid step
    groups = pl.cdiv(groups, step) * step
    blocks = pl.cdiv(rows * split, SUBLANES)
    row_padding = blocks * SUBLANES // split - rows
    token_padding = groups * GROUP * split - tokens if split > 1 else 0
    if row_padding or token_padding:
        keys = jnp.pad(keys, ((0, row_padding), (0, token_padding)))
    keys = keys.reshape(blocks * SUBLANES, -1)
    end = jnp.repeat(jnp.pad(end.astype(jnp.int32), (0, row_padding)), split)
    end = jnp.broadcast_to(end[:, None], (blocks * SUBLANES, LANES))

    slot_bits = 12 + (groups * split - 1).bit_length()
    slot_planes = slot_bits + slot_bits % 2
    words = pl.pallas_call(
        functools.partial(_kernel, begin=begin, m=m, split=split, step=step),
        grid=(blocks, groups // step),
        in_specs=[
            pl.BlockSpec((SUBLANES, LANES), lambda block, i: (block, 0)),
            pl.BlockSpec((SUBLANES, step * GROUP), lambda block, i: (block, i)),
        ],
        out_specs=pl.BlockSpec((None, groups, SUBLANES, LANES), lambda block, i: (block, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((blocks, groups, SUBLANES, LANES), jnp.int32),
        scratch_shapes=[
            pltpu.VMEM((slot_planes + WORD, groups, SUBLANES, LANES), jnp.int32),
            pltpu.VMEM((groups, SUBLANES, LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        name="select_threshold",
    )(end, keys)
    if split == 1:
        return words
    # One row per sublane from here on.
    per_block = SUBLANES // split
    words = words.reshape(blocks, groups, per_block, split, LANES).transpose(0, 2, 3, 1, 4)
    words = words.reshape(blocks * per_block, split * groups, LANES)
    words = jnp.pad(words, ((0, -words.shape[0] % SUBLANES), (0, 0), (0, 0)))
    return words.reshape(-1, SUBLANES, split * groups, LANES).transpose(0, 2, 1, 3)


def _kernel(end_ref, keys_ref, words_ref, planes_ref, open_ref, *, begin, m, split, step):
    i = pl.program_id(1)

    @pl.loop(0, step)
    def _(group):
        keys = keys_ref[:, pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)]
        keys = jnp.stack([keys[:, bit * LANES : (bit + 1) * LANES] for bit in range(WORD)])
        planes = _planes(sortable(keys))
        highest = planes_ref.shape[0] - 1
        planes_ref[pl.ds(highest + 1 - WORD, WORD - 1), i * step + group] = planes[: WORD - 1]
        planes_ref[highest, i * step + group] = ~planes[WORD - 1]  # of the signs, the negative one is the smaller

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        _search(end_ref, words_ref, planes_ref, open_ref, begin=begin, m=m, split=split)


def sortable(keys: jax.Array) -> jax.Array:
    """int32 in the order of the keys. Floats are a sign and a magnitude: -0.0 and 0.0 are equal."""
    if keys.dtype == jnp.int32:
        return keys
    bits = lax.bitcast_convert_type(keys, jnp.int32)
    return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def _planes(words: Int[Array, "32 8 128"]) -> Int[Array, "32 8 128"]:
    """Transposes bits: bit i of result p is bit p of word i. Five rounds of swapping blocks off the diagonal."""
    for b in reversed(range(5)):
        size = 1 << b
        pairs = words.reshape(WORD // (2 * size), 2, size, *words.shape[1:])
        upper, lower = pairs[:, 0], pairs[:, 1]
        difference = ((upper >> size) ^ lower) & LOWER_BITS[b]
        words = jnp.stack([upper ^ (difference << size), lower ^ difference], axis=1).reshape(words.shape)
    return words


def _search(end_ref, words_ref, planes_ref, open_ref, *, begin, m, split):
    groups, slot_planes = words_ref.shape[0], planes_ref.shape[0] - WORD
    chunk = min(CHUNK, groups)
    shape = (chunk, SUBLANES, LANES)
    lane = lax.broadcasted_iota(jnp.int32, shape, 2)
    first_group = (lax.broadcasted_iota(jnp.int32, shape, 1) & (split - 1)) * groups

    def number(at):
        """Of the groups of a chunk."""
        return first_group + at * chunk + lax.broadcasted_iota(jnp.int32, shape, 0)

    def part(at):
        return pl.ds(pl.multiple_of(at * chunk, chunk), chunk)

    def digit(p):
        return lambda at: (planes_ref[p + 1, part(at)], planes_ref[p, part(at)])

    def slot_plane(b, at):
        """Inverted bit b of the slots' numbers: first those of the lane, then of the bit, then of the group."""
        if b < 7:
            return (lane >> b & 1) - 1
        if b < 12:
            return jnp.full(shape, LOWER_BITS[b - 7], jnp.int32)
        return (number(at) >> (b - 12) & 1) - 1

    def count(still, digit):
        """How many have a digit of at least 3, 2, 1."""
        high, low = still & digit[0], still & digit[1]
        return jnp.stack([jnp.sum(lax.population_count(x), axis=0) for x in (high & low, high, high | low)])

    def begin_with(highest):
        def step(at, totals):
            base = number(at) * GROUP + lane
            still = _bits_below(end_ref[...][None] - base) & ~_bits_below(begin - base)
            words_ref[part(at)] = jnp.zeros(shape, jnp.int32)
            open_ref[part(at)] = still
            for b in range(slot_planes):
                planes_ref[b, part(at)] = slot_plane(b, at)
            return totals + count(still, highest(at))

        return lax.fori_loop(0, groups // chunk, step, no_count)

    def settle(totals, need, present, following):
        """Decides by the counts of one digit, and counts the following one."""
        totals = _row_sums(totals, split)
        enough = [_enough(total, need) for total in totals]
        high_is_0 = jnp.where(enough[1], 0, -1)
        low_is_0 = jnp.where(enough[0], 0, jnp.where(enough[1], -1, jnp.where(enough[2], 0, -1)))
        chosen = [jnp.where(x, 0.0, total) for x, total in zip(enough, totals, strict=True)]
        need -= jnp.maximum(jnp.maximum(chosen[0], chosen[1]), chosen[2])

        def step(at, totals):
            high, low = present(at)
            still = open_ref[part(at)]
            larger = (high & high_is_0[None]) | (low & low_is_0[None] & (high | high_is_0[None]))
            equal = still & (high ^ high_is_0[None]) & (low ^ low_is_0[None])
            words_ref[part(at)] |= still & larger
            open_ref[part(at)] = equal
            return totals if following is None else totals + count(equal, following(at))

        return lax.fori_loop(0, groups // chunk, step, no_count), need

    no_count = jnp.zeros((3, SUBLANES, LANES), jnp.int32)
    planes = planes_ref.shape[0]
    totals = begin_with(digit(planes - 2))
    need = jnp.full((SUBLANES, LANES), m, jnp.float32)

    def step(i, carry):
        p = planes - 2 - 2 * i
        totals, need = carry
        return settle(totals, need, digit(p), digit(p - 2))

    totals, need = lax.fori_loop(0, planes // 2 - 1, step, (totals, need))
    settle(totals, need, digit(0), None)

    # What is left open is one slot per row, the last one needed, or none.
    @pl.loop(0, groups // chunk)
    def _(at):
        words_ref[part(at)] |= open_ref[part(at)]


def _enough(total: Float[Array, "8 128"], need: Float[Array, "8 128"]) -> Bool[Array, "8 128"]:
    return total >= need


def _bits_below(distance: Int[Array, "groups 8 128"]) -> Int[Array, "groups 8 128"]:
    """The word whose bit i is set where 128 i < distance."""
    count = jnp.clip((distance + LANES - 1) >> 7, 0, WORD)
    return jnp.where(count == WORD, -1, (1 << (count & (WORD - 1))) - 1)


def _row_sums(counts: Int[Array, "n 8 128"], split: int) -> Float[Array, "n 8 128"]:
    """Sums over the lanes and the sublanes of each row, in all of them."""
    # The hardware adds over lanes in float32, which holds counts up to 2^24.
    totals = jnp.sum(counts.astype(jnp.float32), axis=2, keepdims=True)
    totals = jnp.broadcast_to(totals, counts.shape)
    sublane = lax.broadcasted_iota(jnp.int32, counts.shape, 1)
    distance = 1
    while distance < split:
        up, down = pltpu.roll(totals, distance, 1), pltpu.roll(totals, SUBLANES - distance, 1)
        totals += jnp.where(sublane & distance == 0, down, up)
        distance *= 2
    return totals
