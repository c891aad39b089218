"""Third kernel of select_tokens on TPU: the chosen slots of every row, weakest first.

First each slot's key is fetched, then the pairs of key and slot are sorted by a bitonic network. A fetch from
anywhere in the row does not exist, only one from 128 neighbours; but the slots come in order of their group
(`tpu_threshold`), so that 128 entries of the list need few groups: each of these entries fetches its lane from all 32
registers of a group, and the slot's bit number picks one of them. How many groups that is depends on how the slots
lie; if rows of a block differ much, it is all groups between the least and the greatest.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.ops.select_tokens.tpu_threshold import GROUP, LANES, SUBLANES, WORD, sortable

CHUNK = 8  # pairs of registers worked on at once
LOWEST = -(2**31)  # below the keys of all finite floats, and of all turns


def weakest_first(
    keys: Float[Array, "rows tokens"] | Int[Array, "rows tokens"],
    slots: Int[Array, "padded_rows m"],
) -> Int[Array, "rows m"]:
    """Slots with the smallest keys first, of equal ones the later slot; -1 (none) before all."""
    (rows, tokens), m = keys.shape, slots.shape[1]
    registers = 1 << (pl.cdiv(m, LANES) - 1).bit_length()
    blocks = pl.cdiv(rows, SUBLANES)
    slots = jnp.pad(slots[: blocks * SUBLANES], ((0, 0), (0, registers * LANES - m)), constant_values=-1)
    held = min(rows, SUBLANES)
    padded = pl.cdiv(tokens, GROUP) * GROUP
    in_order = pl.pallas_call(
        functools.partial(_kernel, held=held),
        grid=(blocks,),
        in_specs=[
            pl.BlockSpec((SUBLANES, registers * LANES), lambda block: (block, 0)),
            pl.BlockSpec((held, padded), lambda block: (block, 0)),
        ],
        out_specs=pl.BlockSpec((None, registers, SUBLANES, LANES), lambda block: (block, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((blocks, registers, SUBLANES, LANES), jnp.int32),
        scratch_shapes=[pltpu.VMEM((registers, SUBLANES, LANES), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=48 * 2**20),
        name="select_sort",
    )(slots, keys)
    # Number `lane * registers + register` of the sorted row stands in that register and lane.
    in_order = in_order.transpose(0, 2, 3, 1).reshape(blocks * SUBLANES, registers * LANES)
    return in_order[:rows, registers * LANES - m :]


def _kernel(unsorted_ref, keys_ref, slot_ref, key_ref, *, held):
    registers = slot_ref.shape[0]

    @pl.loop(0, registers)
    def _(register):
        slots = unsorted_ref[:, pl.ds(pl.multiple_of(register * LANES, LANES), LANES)]
        slot_ref[register] = slots
        key_ref[register] = _fetch(slots, keys_ref, held)

    size_bits = (registers * LANES).bit_length() - 1
    register_bits = registers.bit_length() - 1

    @pl.loop(1, size_bits + 1)
    def _(stage):
        # Runs of 2^stage become sorted, by comparing over distances 2^(stage-1), .., 1.
        @pl.loop(0, stage)
        def _(step):
            distance_bit = stage - 1 - step

            for bit in range(register_bits):
                pl.when(distance_bit == bit)(
                    functools.partial(_compare_registers, key_ref, slot_ref, 1 << stage, 1 << bit)
                )

            @pl.when(distance_bit >= register_bits)
            def _():
                _compare_lanes(key_ref, slot_ref, 1 << stage, 1 << (distance_bit - register_bits))


def _fetch(slots: Int[Array, "8 128"], keys_ref, held: int) -> Int[Array, "8 128"]:
    used = slots >= 0
    group, bit, lane = slots >> 12, (slots >> 7) & (WORD - 1), slots & (LANES - 1)
    least = jnp.min(jnp.where(used, group, keys_ref.shape[1]))
    greatest = jnp.max(jnp.where(used, group, -1))

    def from_group(number, found):
        keys = keys_ref[:, pl.ds(pl.multiple_of(number * GROUP, GROUP), GROUP)]
        if held < SUBLANES:
            keys = jnp.concatenate([keys, jnp.zeros((SUBLANES - held, GROUP), keys.dtype)])
        candidates = [_lanes(keys[:, b * LANES : (b + 1) * LANES], lane) for b in range(WORD)]
        # A tournament by the bits of `bit`.
        for b in range(5):
            odd = (bit & (1 << b)) != 0
            candidates = [jnp.where(odd, y, x) for x, y in zip(candidates[::2], candidates[1::2], strict=True)]
        return jnp.where(used & (group == number), sortable(candidates[0]), found)

    return lax.fori_loop(least, greatest + 1, from_group, jnp.full(slots.shape, LOWEST, jnp.int32))


def _lanes(x: jax.Array, lane: Int[Array, "8 128"]) -> jax.Array:
    """Every entry takes that of its row in the given lane."""
    return jnp.take_along_axis(x, lane, axis=1, mode="promise_in_bounds")


def _before(
    key: Int[Array, "*n 8 128"],
    slot: Int[Array, "*n 8 128"],
    other_key: Int[Array, "*n 8 128"],
    other_slot: Int[Array, "*n 8 128"],
) -> Bool[Array, "*n 8 128"]:
    return (key < other_key) | ((key == other_key) & (slot > other_slot))


def _downward(registers: int, register: Int[Array, "*n 8 128"], size: Int[Array, ""]) -> Bool[Array, "*n 8 128"]:
    """Which entries of these registers belong to a run that is to be sorted the other way round."""
    lane = lax.broadcasted_iota(jnp.int32, register.shape, register.ndim - 1)
    return ((lane * registers + register) & size) != 0


def _compare_registers(key_ref, slot_ref, size, distance: int):
    registers = key_ref.shape[0]
    together = min(CHUNK, registers // 2)  # pairs
    apart = distance >= together

    @pl.loop(0, registers // 2 // together)
    def _(chunk):
        # A pair's lower register has a 0 in the bit that is `distance`.
        pair = chunk * together
        first = (pair // distance) * (2 * distance) + pair % distance if apart else 2 * pair

        def read(ref):
            if apart:
                return ref[pl.ds(first, together)], ref[pl.ds(first + distance, together)]
            runs = ref[pl.ds(first, 2 * together)].reshape(together // distance, 2, distance, SUBLANES, LANES)
            shape = (together, SUBLANES, LANES)
            return runs[:, 0].reshape(shape), runs[:, 1].reshape(shape)

        def write(ref, low, high):
            if apart:
                ref[pl.ds(first, together)], ref[pl.ds(first + distance, together)] = low, high
            else:
                runs = (together // distance, distance, SUBLANES, LANES)
                both = jnp.stack([low.reshape(runs), high.reshape(runs)], axis=1)
                ref[pl.ds(first, 2 * together)] = both.reshape(2 * together, SUBLANES, LANES)

        keys, slots = read(key_ref), read(slot_ref)
        count = lax.broadcasted_iota(jnp.int32, keys[0].shape, 0)
        register = first + (count if apart else (count // distance) * (2 * distance) + count % distance)
        swap = _before(keys[1], slots[1], keys[0], slots[0]) ^ _downward(registers, register, size)
        for ref, (low, high) in ((key_ref, keys), (slot_ref, slots)):
            write(ref, jnp.where(swap, high, low), jnp.where(swap, low, high))


def _compare_lanes(key_ref, slot_ref, size, distance):
    registers = key_ref.shape[0]
    together = min(2 * CHUNK, registers)
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    partner, upper = lane ^ distance, (lane & distance) != 0

    @pl.loop(0, registers // together)
    def _(chunk):
        at = pl.ds(chunk * together, together)
        keys, slots = key_ref[at], slot_ref[at]
        other_keys = jnp.stack([_lanes(keys[i], partner) for i in range(together)])
        other_slots = jnp.stack([_lanes(slots[i], partner) for i in range(together)])
        register = chunk * together + lax.broadcasted_iota(jnp.int32, keys.shape, 0)
        take = _before(other_keys, other_slots, keys, slots) ^ upper[None] ^ _downward(registers, register, size)
        key_ref[at] = jnp.where(take, other_keys, keys)
        slot_ref[at] = jnp.where(take, other_slots, slots)
