"""The kernel of gather_attention: several blocks of tokens that are fetched one by one, both ways to run a DMA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import TokenMajor, dispatch, empty_cache, from_heads, gather_attention, interpreted
from pallas_kernels.cache import LANES
from pallas_kernels.ops import fetch
from pallas_kernels.ops.gather_attention import pallas_tpu
from tests.pallas_kernels.arg_specs import (
    LAYER,
    LAYERS,
    ArgSpec,
    assert_close,
    generator,
    jitted,
    masked,
    normal,
    stacked,
)

# Programs run once or a few times: what optimising them costs would not come back.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

BLOCK, BUDGET = 8, 19  # three blocks, the last of which is filled up
# Rows that share words of memory, heads that share rows of lanes, one row alone, groups that fill no tile.
SPECS = {
    spec.name: spec
    for spec in (
        ArgSpec("gqa4_64_bfloat16", 4, 4, 64, "bfloat16", tokens=24, lengths=(24, 17, 0)),
        ArgSpec("gqa2_128_bfloat16", 1, 2, 128, "bfloat16", tokens=24, lengths=(24, 1)),
        ArgSpec("gqa3_16_float32", 3, 3, 16, "float32", tokens=24, lengths=(24, 5)),
        ArgSpec("mha_64_float32", 2, 1, 64, "float32", tokens=24, lengths=(24, 24)),
    )
}
SMALL = SPECS["gqa3_16_float32"]


@functools.cache
def program(dma, broken=None):
    """The kernel with small blocks, in the interpreter: races and reads out of bounds are errors.

    All DMAs would share an entry of the vector clocks, and a wait for one would hide that another was not waited for.
    `broken` names the variant that a test has put in place, so that nobody else gets its program.
    """
    compiled = jax.jit(
        functools.partial(pallas_tpu.gather_attention, scale=0.5, tokens=BLOCK), compiler_options=UNOPTIMISED
    )
    params = pltpu.InterpretParams(
        dma_execution_mode=dma,
        detect_races=True,
        vector_clock_size=64,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )

    def run(*args, **kwargs):
        with interpreted(params):
            return jax.block_until_ready(compiled(*args, **kwargs))

    return run


def random_positions(spec, heads, random):
    """Slots in use in any order, with repeats, some entries empty; all of them in an empty row and for one head."""
    lengths = np.array(spec.lengths)[:, None, None]
    slots = random.integers(0, np.maximum(lengths, 1), (spec.batch, heads, BUDGET))
    slots = np.where((random.random(slots.shape) < 0.2) | (lengths == 0), -1, slots)
    slots[-1, -1] = -1
    return slots


def check(spec, positions, key, dma="on_wait", broken=None):
    """Against the oracle, from a cache with NaN in its other layers and in the keys that are not selected."""
    random = generator(key)
    heads = np.broadcast_to(positions, (spec.batch, spec.kv_heads, BUDGET))
    in_use = np.any(heads[..., None] == np.arange(spec.tokens), axis=2)[..., None]
    shape = (spec.batch, spec.kv_heads, spec.tokens, spec.head_dim)
    k, v = (jnp.asarray(random.standard_normal(shape), spec.dtype) for _ in range(2))
    q = jnp.asarray(2 * random.standard_normal((spec.batch, spec.kv_heads * spec.group, spec.head_dim)), spec.dtype)
    positions = jnp.asarray(positions, jnp.int32)

    oracle = jitted(gather_attention, scale=0.5, implementation="reference")
    expected = oracle(q, from_heads("head_major", masked(in_use, k, 0), v), positions)
    poisoned = stacked("token_major", masked(in_use, k, np.nan), masked(in_use, v, 1e30))
    actual = program(dma, broken)(q, poisoned, positions, layer=jnp.int32(LAYER))
    assert_close(actual, expected, spec.tolerance)
    empty = np.all(heads < 0, axis=2).repeat(spec.group, axis=1)
    assert not np.asarray(actual, np.float32)[empty].any()


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("gqa4_64_bfloat16", True),
        ("gqa4_64_bfloat16", False),
        ("gqa2_128_bfloat16", True),
        ("gqa3_16_float32", False),
        ("mha_64_float32", True),
    ],
)
def test_over_blocks(name, shared, getkey):
    spec = SPECS[name]
    positions = random_positions(spec, 1 if shared else spec.kv_heads, generator(getkey()))
    check(spec, positions, getkey())


def test_copies_made_when_they_are_started(getkey):
    spec = SPECS["gqa4_64_bfloat16"]
    check(spec, random_positions(spec, spec.kv_heads, generator(getkey())), getkey(), dma="eager")


SLOTS = st.lists(st.integers(-1, SMALL.tokens - 1), min_size=2 * BUDGET, max_size=2 * BUDGET)


@settings(max_examples=8)
@given(slots=SLOTS, seed=st.integers(0, 2**16))
def test_for_any_positions(slots, seed):
    check(SMALL, np.reshape(slots, (2, 1, BUDGET)), jax.random.key(seed))


# Broken variants


@pytest.fixture
def broken_state():
    yield
    pltpu.reset_tpu_interpret_mode_state()  # an error leaves it behind


def no_wait_for_tokens(destination, semaphore, wait=fetch.wait):
    if len(destination.shape) == 2:  # the units, for the scalar unit
        wait(destination, semaphore)


def no_wait_for_units(destination, semaphore, wait=fetch.wait):
    if len(destination.shape) == 3:
        wait(destination, semaphore)


def unit_off_by_one(cache, slots, layer, first_units=fetch.first_units):
    return first_units(cache, slots, layer) + 1


def slot_off_by_one(cache, slots, layer, first_units=fetch.first_units):
    return first_units(cache, jnp.minimum(slots + 1, cache.capacity - 1), layer)


def next_layers(cache, slots, layer, first_units=fetch.first_units):
    return first_units(cache, slots, layer + LAYERS)


@pytest.mark.parametrize(
    ("name", "variant", "dma", "error", "message"),
    [
        ("wait", no_wait_for_tokens, "eager", Exception, "(?i)race"),
        ("wait", no_wait_for_units, "eager", Exception, "(?i)race"),
        ("first_units", next_layers, "on_wait", Exception, "(?i)out-of-bounds"),
        ("first_units", unit_off_by_one, "on_wait", AssertionError, "Not equal to tolerance"),
        ("first_units", slot_off_by_one, "on_wait", AssertionError, "Not equal to tolerance"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_broken_kernel_is_caught(name, variant, dma, error, message, broken_state, getkey, monkeypatch):
    monkeypatch.setattr(fetch, name, variant)
    positions = random_positions(SMALL, 1, generator(getkey()))
    with pytest.raises(error, match=message):
        check(SMALL, positions, getkey(), dma, broken=variant.__name__)


# What the interpreter does not do: rows of bfloat16 are read from memory as words.


@pytest.mark.parametrize(
    ("dtype", "rows"), [("bfloat16", 1), ("bfloat16", 4), ("bfloat16", 6), ("float32", 1), ("float32", 3)]
)
def test_rows_read_as_words(dtype, rows, getkey, monkeypatch):
    monkeypatch.setattr(fetch, "PIECE", 16)
    tokens, half = 24, 1
    cache = TokenMajor(normal(getkey(), (1, 2, tokens, 2, rows, LANES), dtype), pack=1)
    cache = TokenMajor(cache.kv.at[0, half, 20, :, 0, 5].set(jnp.nan), pack=1)
    buffer = fetch.in_units(cache)
    buffer = buffer.reshape(2, -1, *buffer.shape[1:])
    units = fetch.units_per_token(cache)
    loaded = []

    def kernel(block, out):
        load = fetch.reader(block, pl.program_id(0) + half, units, after=loaded.append, finite=True)
        for row in range(2 * rows):
            out[row] = load(row).astype(jnp.float32)

    # JAX's other interpreter has references viewed as words.
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    out_shape = jax.ShapeDtypeStruct((2 * rows, tokens, LANES), jnp.float32)
    out = pl.pallas_call(kernel, grid=(1,), out_shape=out_shape, interpret=True)(buffer)
    expected = np.asarray(cache.kv, np.float32)[0, half].reshape(tokens, 2 * rows, LANES)
    np.testing.assert_array_equal(out, np.nan_to_num(np.swapaxes(expected, 0, 1)))
    assert sum(loaded) == tokens * units and set(loaded) == {16, 8}


# Geometry


def shape_of(**sizes):
    return jax.eval_shape(functools.partial(empty_cache, "token_major", layers=2, dtype=jnp.bfloat16, **sizes))


def test_units_of_a_token_are_its_words():
    cache = shape_of(batch=3, capacity=100, kv_heads=8, head_dim=128)
    assert (fetch.rows_per_unit(cache), fetch.units_per_token(cache)) == (2, 8)  # 8 x 512 B are its 4 KiB
    slots = jnp.array([0, 7, -1])[None, None, None, :] * jnp.ones((3, 1, 1, 1), jnp.int32)
    # The first token of layer 1 is the 300th, that of its last row the 500th.
    np.testing.assert_array_equal(
        fetch.first_units(cache, slots, 1)[:, 0, 0], [[2400, 2456, 2400], [3200, 3256, 3200], [4000, 4056, 4000]]
    )


def test_blocks_are_filled_up_with_empty_entries():
    blocks = fetch.in_blocks(jnp.arange(5, dtype=jnp.int32).reshape(1, 1, 5), 4)
    np.testing.assert_array_equal(blocks, [[[[0, 1, 2, 3], [4, -1, -1, -1]]]])


def test_size_of_a_block():
    sizes = {"batch": 1, "capacity": 100}
    large = shape_of(kv_heads=8, head_dim=128, **sizes)
    assert fetch.block_tokens(large, 4096) == fetch.LARGEST_BLOCK == 256
    assert fetch.block_tokens(large, 21) == 24  # whole tiles of sublanes
    assert fetch.block_tokens(shape_of(kv_heads=64, head_dim=128, **sizes), 4096) == 64  # 2 MiB


def test_padded_rows_are_declined(monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    cache = shape_of(batch=1, capacity=8, kv_heads=12, head_dim=128)
    with pytest.raises(NotImplementedError, match="at most 8 rows of heads or a multiple of 8, got 12"):
        fetch.in_units(cache)
