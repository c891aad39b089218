"""First kernel of select_tokens on TPU: which slots are chosen, as one bit per slot.

The m strongest of a row are found by radix selection, one bit of the key at a time and from the highest: of the
slots still in question, those with a 1 are either too many, and the others drop out, or all chosen, and the
search goes on among the others. Counting in 32-bit keys would touch every key 32 times. So the keys are first
turned into bit planes: a word of plane p holds bit p of 32 keys, and a step of the search is a few logical
operations and a population count on a 32nd of the data. Equal keys are told apart in the same way by the bits of
the slot's number, inverted as the lower slot goes first; those planes are known without any memory.

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
from jaxtyping import Array, Float, Int

WORD = 32  # bits
LANES = 128
SUBLANES = 8
GROUP = WORD * LANES  # slots
# Bit i of constant b is bit b of i.
BITS_OF_BIT = tuple(
    int.from_bytes(sum(((i >> b) & 1) << i for i in range(WORD)).to_bytes(4, "little"), "little", signed=True)
    if False
    else (lambda x: x - (1 << 32) if x >> 31 else x)(sum(((i >> b) & 1) << i for i in range(WORD)))
    for b in range(5)
)


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
    blocks = pl.cdiv(rows * split, SUBLANES)
    row_padding = blocks * SUBLANES // split - rows
    token_padding = groups * GROUP * split - tokens if split > 1 else 0
    if row_padding or token_padding:
        keys = jnp.pad(keys, ((0, row_padding), (0, token_padding)))
    keys = keys.reshape(blocks * SUBLANES, -1)
    end = jnp.repeat(jnp.pad(end.astype(jnp.int32), (0, row_padding)), split)
    end = jnp.broadcast_to(end[:, None], (blocks * SUBLANES, LANES))

    step = next(size for size in (4, 2, 1) if groups % size == 0)  # groups per grid step
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
            pltpu.VMEM((WORD, groups, SUBLANES, LANES), jnp.int32),
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
        keys = [keys_ref[:, pl.ds(pl.multiple_of(group * GROUP + bit * LANES, LANES), LANES)] for bit in range(WORD)]
        planes_ref[:, i * step + group] = _planes(_sortable(jnp.stack(keys)))

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        _search(end_ref, words_ref, planes_ref, open_ref, begin=begin, m=m, split=split)


def _sortable(keys: jax.Array) -> jax.Array:
    """int32 whose order without sign is the order of the keys."""
    lowest = jnp.int32(-(2**31))
    if keys.dtype == jnp.int32:
        return keys ^ lowest
    # -0.0 and 0.0 are equal.
    bits = lax.bitcast_convert_type(jnp.where(keys == 0, 0.0, keys), jnp.int32)
    return bits ^ ((bits >> 31) | lowest)


def _planes(words: Int[Array, "32 8 128"]) -> Int[Array, "32 8 128"]:
    """Transposes bits: bit i of result p is bit p of word i. Five rounds of swapping blocks off the diagonal."""
    for size, low in ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        pairs = words.reshape(WORD // (2 * size), 2, size, *words.shape[1:])
        upper, lower = pairs[:, 0], pairs[:, 1]
        difference = ((upper >> size) ^ lower) & low
        words = jnp.stack([upper ^ (difference << size), lower ^ difference], axis=1).reshape(words.shape)
    return words


def _search(end_ref, words_ref, planes_ref, open_ref, *, begin, m, split):
    groups = words_ref.shape[0]
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    first_group = (sublane & (split - 1)) * groups
    end = end_ref[...]

    @pl.loop(0, groups)
    def _(group):
        base = (first_group + group) * GROUP + lane
        open_ref[group] = _bits_below(end - base) & ~_bits_below(begin - base)
        words_ref[group] = jnp.zeros((SUBLANES, LANES), jnp.int32)

    def decide(plane, need):
        """One step: `plane(group)` splits the slots in question."""

        def count(group, total):
            return total + lax.population_count(open_ref[group] & plane(group))

        ones = _row_sum(lax.fori_loop(0, groups, count, jnp.zeros((SUBLANES, LANES), jnp.int32)), split)
        too_many = ones >= need

        @pl.loop(0, groups)
        def _(group):
            still, word = open_ref[group], plane(group)
            words_ref[group] |= jnp.where(too_many, 0, still & word)
            open_ref[group] = still & jnp.where(too_many, word, ~word)

        return jnp.where(too_many, need, need - ones)

    need = jnp.full((SUBLANES, LANES), m, jnp.int32)
    need = lax.fori_loop(0, WORD, lambda p, need: decide(lambda group: planes_ref[WORD - 1 - p, group], need), need)

    # Equal keys: by the slot's number, group, then bit, then lane.
    for b in reversed(range(max(groups * split - 1, 0).bit_length())):
        need = decide(lambda group, b=b: ((first_group + group) >> b & 1) - 1, need)
    for b in reversed(range(5)):
        need = decide(lambda group, b=b: jnp.full((SUBLANES, LANES), ~BITS_OF_BIT[b], jnp.int32), need)
    for b in reversed(range(7)):
        need = decide(lambda group, b=b: (lane >> b & 1) - 1, need)

    # What is left in question is one slot per row, the last one needed, or none.
    @pl.loop(0, groups)
    def _(group):
        words_ref[group] |= open_ref[group]


def _bits_below(distance: Int[Array, "8 128"]) -> Int[Array, "8 128"]:
    """The word whose bit i is set where 128 i < distance."""
    count = jnp.clip((distance + LANES - 1) >> 7, 0, WORD)
    return jnp.where(count == WORD, -1, (1 << (count & (WORD - 1))) - 1)


def _row_sum(counts: Int[Array, "8 128"], split: int) -> Int[Array, "8 128"]:
    """Sums over the lanes and the sublanes of each row, in all of them."""
    # Counts stay below 2^24: exact in float32, in which the hardware adds over lanes.
    total = jnp.sum(counts.astype(jnp.float32), axis=1, keepdims=True).astype(jnp.int32)
    total = jnp.broadcast_to(total, counts.shape)
    sublane = lax.broadcasted_iota(jnp.int32, counts.shape, 0)
    distance = 1
    while distance < split:
        up, down = pltpu.roll(total, distance, 0), pltpu.roll(total, SUBLANES - distance, 0)
        total += jnp.where(sublane & distance == 0, down, up)
        distance *= 2
    return total
