"""prefill_attention's kernel in the interpreter: blocks of queries, blocks of the cache, races, broken variants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import empty_cache, interpreted, prefill_attention
from pallas_kernels.ops.prefill_attention import pallas_tpu
from tests.pallas_kernels.arg_specs import LAYER, TOLERANCE, assert_close, jitted, masked, normal, stacked

CAPACITY, CHUNK = 300, 20  # the last of three blocks of the cache and of the blocks of queries are ragged


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "QUERY_ROWS", 32)
    monkeypatch.setattr(pallas_tpu, "CACHE_SLOTS", 128)


def random_arguments(kv_heads, group, head_dim, dtype, getkey):
    q = 2 * normal(getkey(), (1, kv_heads * group, CHUNK, head_dim), dtype)
    k, v = (normal(getkey(), (1, kv_heads, CAPACITY, head_dim), dtype) for _ in range(2))
    return q, k, v


def outputs(attend, q, k, v, start):
    """Of a kernel, over a cache with nothing useful behind the chunk, and of the oracle."""
    written = (np.arange(CAPACITY) < start + CHUNK)[:, None]
    cache = stacked("token_major", masked(written, k, np.nan), masked(written, v, 1e30))
    oracle = jitted(prefill_attention, implementation="reference")
    expected = oracle(q, stacked("head_major", k, v), jnp.int32(start), layer=LAYER)
    return attend(q, cache, jnp.int32(start), layer=LAYER), expected


def traced_anew(mode="on_wait"):
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan")
    attend = jax.jit(functools.partial(prefill_attention, implementation="pallas_tpu"))

    def run(*args, **kwargs):
        with interpreted(params):
            return jax.block_until_ready(attend(*args, **kwargs))

    return run


@pytest.mark.parametrize(
    ("shape", "start", "mode"),
    [
        ((2, 2, 64, "float32"), 110, "eager"),  # two heads in a row of lanes; across a border between blocks
        ((2, 2, 64, "float32"), 110, "on_wait"),
        ((2, 4, 128, "bfloat16"), CAPACITY - CHUNK, "eager"),
        ((2, 4, 128, "bfloat16"), CAPACITY - CHUNK, "on_wait"),
        ((3, 1, 64, "bfloat16"), 0, "on_wait"),  # a number of heads that cannot share rows
    ],
    ids=str,
)
def test_matches_oracle_in_both_dma_modes(shape, start, mode, getkey):
    q, k, v = random_arguments(*shape, getkey)
    actual, expected = outputs(traced_anew(mode), q, k, v, start)
    assert_close(actual, expected, TOLERANCE[shape[3]])


def test_a_start_in_every_place_of_a_block(getkey):
    q, k, v = random_arguments(1, 1, 64, "float32", getkey)
    attend = jitted(prefill_attention, implementation="pallas_tpu")
    # The first block ends with the first query, one query later, with the last query, before any query.
    for start in (127, 126, 128 - CHUNK, 128):
        actual, expected = outputs(attend, q, k, v, start)
        assert_close(actual, expected, TOLERANCE["float32"])


def one_slot_more(kernel):
    """Shows every query the slot behind its own."""

    def broken(scalars, *refs, **options):
        kernel([scalars[0] + 1, scalars[1]], *refs, **options)

    return broken


def one_block_less(index):
    """Fetches the block before the last one again in its place."""

    def broken(b, i, j, scalars, **options):
        layer, row, block, *rest = index(b, i, j, scalars, **options)
        return layer, row, jnp.minimum(block, 1), *rest

    return broken


def previous_layer(index):
    def broken(*args, **options):
        layer, *rest = index(*args, **options)
        return layer - 1, *rest

    return broken


@pytest.mark.parametrize(
    ("part", "break_it"),
    [("_kernel", one_slot_more), ("_cache_index", one_block_less), ("_cache_index", previous_layer)],
)
def test_a_kernel_that_is_off_by_one_is_caught(part, break_it, getkey, monkeypatch):
    q, k, v = random_arguments(1, 1, 64, "float32", getkey)
    monkeypatch.setattr(pallas_tpu, part, break_it(getattr(pallas_tpu, part)))
    actual, expected = outputs(traced_anew(), q, k, v, 270)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(actual, expected, TOLERANCE["float32"])


def test_blocks_that_no_query_sees_are_not_fetched(getkey):
    """A NaN value spoils what multiplies it, if only by zero: these are in the first block not needed."""
    q, k, v = random_arguments(1, 1, 64, "float32", getkey)
    attend = jitted(prefill_attention, implementation="pallas_tpu")
    cache = stacked("token_major", k, masked((np.arange(CAPACITY) < 128)[:, None], v, np.nan))
    for start, is_read in ((128 - CHUNK, False), (129 - CHUNK, True)):
        out = attend(q, cache, jnp.int32(start), layer=LAYER)
        assert bool(jnp.isnan(out).any()) == is_read


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("query_heads", "chunk"), [(32, 512), (32, 1), (64, 1000), (8, 4096), (1024, 50)])
def test_query_blocks_are_whole_tiles_that_cover_the_chunk(query_heads, chunk, itemsize, monkeypatch):
    monkeypatch.undo()
    block = pallas_tpu.query_block(query_heads, chunk, itemsize)
    tile = 32 // itemsize
    blocks = -(-chunk // block)
    assert block % tile == 0
    assert blocks * block - chunk < tile * blocks
    assert block == tile or block * query_heads * itemsize <= 2 * pallas_tpu.QUERY_ROWS


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32])
def test_cache_blocks_are_multiples_of_128_slots_that_fit(kv_heads, monkeypatch):
    monkeypatch.undo()
    sizes = dict(layers=1, batch=1, kv_heads=kv_heads, capacity=131_072, head_dim=128, dtype="bfloat16")
    blocks = []
    jax.eval_shape(lambda: blocks.append(pallas_tpu.cache_block(empty_cache("token_major", **sizes))))
    assert blocks[0] % 128 == 0
    assert 2 * kv_heads * 128 * 2 * blocks[0] <= pallas_tpu.CACHE_BYTES


def test_a_head_major_cache_is_refused(getkey):
    q, k, v = random_arguments(1, 1, 64, "float32", getkey)
    with interpreted(), pytest.raises(NotImplementedError, match="needs a TokenMajor cache, got HeadMajor"):
        prefill_attention(q, stacked("head_major", k, v), 0, implementation="pallas_tpu")
