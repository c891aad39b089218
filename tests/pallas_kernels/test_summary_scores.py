"""page_scores and chunk_scores: a query step against what is kept of each page or chunk, and how bounds are kept."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chunk_scores, empty_cache, from_heads, interpreted, page_scores
from pallas_kernels.checks import GROUP_REDUCTIONS
from pallas_kernels.ops import token_major
from pallas_kernels.ops.chunk_scores import pallas_tpu as chunk_kernel
from pallas_kernels.ops.page_scores import bounds as page_bounds_module
from pallas_kernels.ops.page_scores import pallas_tpu as page_kernel
from pallas_kernels.ops.page_scores.bounds import page_bounds, update_page_bounds
from tests.pallas_kernels.arg_specs import (
    ARG_SPECS,
    IMPLEMENTATIONS_AND_LAYOUTS,
    LAYER,
    LAYERS,
    ArgSpec,
    assert_close,
    cache_arguments,
    masked,
    normal,
    stacked,
)

by_name = functools.partial(pytest.mark.parametrize, ids=lambda spec: spec.name)
implementations = pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
LAYOUTS = pytest.mark.parametrize("layout", ["head_major", "token_major"])
PAGE_SIZE = 4
# Programs run once or a few times: what optimising them costs would not come back.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Vectors of whole tiles of lanes and of 64 channels; more blocks than one, of which the last is cut short; a row
# that is full, one that is empty, one that ends in the second.
BLOCK = 128
MANY_BLOCKS = tuple(
    ArgSpec(f"blocks_{dtype}_{head_dim}", kv_heads, 2, head_dim, dtype, tokens=300, lengths=(300, 0, 129))
    for kv_heads, head_dim, dtype in ((2, 128, "float32"), (4, 64, "bfloat16"))
)
DMA_IDS = [f"{MANY_BLOCKS[0].name}-eager", f"{MANY_BLOCKS[1].name}-on_wait"]


def reduction(spec):
    """Another one for every spec of the grid, so that all are walked over without a program for each pair."""
    return GROUP_REDUCTIONS[ARG_SPECS.index(spec) % len(GROUP_REDUCTIONS)]


def page_arguments(spec, getkey, page_size=PAGE_SIZE):
    """A query, bounds in heads with NaN in pages not in use, and lengths in tokens that end within a page."""
    args = cache_arguments(spec, getkey)
    low, high = np.asarray(args.k), np.asarray(args.v)
    in_use = (np.arange(spec.tokens) < np.array(spec.lengths)[:, None])[:, None, :, None]
    minima, maxima = np.minimum(low, high), np.maximum(low, high)
    bounds = tuple(masked(in_use, x, np.nan) for x in (minima, maxima))
    lengths = [max(pages * page_size - pages % page_size, 0) for pages in spec.lengths]
    return args.q, bounds, jnp.array(lengths, jnp.int32)


@functools.cache
def program(operation, dma="on_wait", **options):
    """`operation` with `options`; kernels in the interpreter, where races and reads out of bounds are errors."""
    compiled = jax.jit(functools.partial(operation, **options), compiler_options=UNOPTIMISED)

    def run(*args, **kwargs):
        params = pltpu.InterpretParams(
            dma_execution_mode=dma, detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
        )
        with interpreted(params):
            return jax.block_until_ready(compiled(*args, **kwargs))

    return run


# page_scores


def scores_of_heads(q, minima, maxima, lengths, *, score=page_scores, layout="head_major", **options):
    """`score` with bounds made of heads inside the program, in the layer between two that hold NaN."""
    return score(q, stacked(layout, minima, maxima), lengths, layer=LAYER, **options)


@implementations
def test_page_scores_worked_by_hand(implementation, layout):
    # q = (2, -1). Page 0 has keys (1, 3) and (4, -2): minima (1, -2), maxima (4, 3), so 2 * 4 + -1 * -2 = 10, which the
    # second key reaches. Page 1 has (0, 5) and (1, 6): minima (0, 5), maxima (1, 6), so 2 - 5 = -3; they have -5 and
    # -4. Of page 2 one token is in use, (-1, -1): -1. Page 3 is padding.
    # The other query head, (0, 1), has 3, 6, -1; the sum is 13, 3, -2.
    minima = jnp.array([[[[1.0, -2.0], [0.0, 5.0], [-1.0, -1.0], [jnp.nan] * 2]]])
    maxima = jnp.array([[[[4.0, 3.0], [1.0, 6.0], [-1.0, -1.0], [jnp.nan] * 2]]])
    q = jnp.array([[[2.0, -1.0], [0.0, 1.0]]])
    by_hand = {"max": [10, 6, -1], "sum": [13, 3, -2], "mean": [6.5, 1.5, -1]}
    # The oracle is held to all of them here, and the others to the oracle below.
    for group_reduction in by_hand if implementation == "reference" else ["sum"]:
        options = {"implementation": implementation, "layout": layout, "group_reduction": group_reduction}
        actual = program(scores_of_heads, page_size=2, **options)(q, minima, maxima, jnp.array([5]))
        expected = [x * 2**-0.5 for x in by_hand[group_reduction]] + [-np.inf]
        np.testing.assert_allclose(actual, [[expected]], rtol=1e-6)


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS[1:])
def test_page_scores_match_oracle(implementation, layout, spec, getkey):
    q, bounds, lengths = page_arguments(spec, getkey)
    options = {"page_size": PAGE_SIZE, "group_reduction": reduction(spec)}
    expected = program(page_scores, implementation="reference", **options)(
        q, from_heads("head_major", *bounds), lengths
    )
    pages = -(-np.asarray(lengths) // PAGE_SIZE)[:, None, None]
    in_use = np.broadcast_to(np.arange(spec.tokens)[None, None, :] < pages, expected.shape)
    np.testing.assert_array_equal(np.isfinite(expected), in_use)
    score = program(scores_of_heads, implementation=implementation, layout=layout, **options)
    assert_close(score(q, *bounds, lengths), expected, spec.tolerance)


def assert_page_kernel_matches(spec, dma, getkey, make=program):
    q, bounds, lengths = page_arguments(spec, getkey)
    options = {"page_size": PAGE_SIZE, "scale": 0.1, "group_reduction": "max"}
    expected = program(scores_of_heads, implementation="xla", **options)(q, *bounds, lengths)
    kernel = make(scores_of_heads, dma, score=page_kernel.page_scores, layout="token_major", pages=BLOCK, **options)
    assert_close(kernel(q, *bounds, lengths), expected, spec.tolerance)


@pytest.mark.parametrize(("spec", "dma"), [(MANY_BLOCKS[0], "eager"), (MANY_BLOCKS[1], "on_wait")], ids=DMA_IDS)
def test_page_kernel_over_many_blocks(dma, spec, getkey):
    assert_page_kernel_matches(spec, dma, getkey)


def test_page_kernel_that_reads_the_next_block_is_noticed(monkeypatch, getkey):
    right = token_major.block_in_use
    wrong = lambda tokens, row, step, *refs: right(tokens, row, step + 1, *refs)  # noqa: E731
    monkeypatch.setattr(token_major, "block_in_use", wrong)
    with pytest.raises(AssertionError, match=r"mismatch|Mismatch"):
        # Not from the cache of programs, nor into it.
        assert_page_kernel_matches(MANY_BLOCKS[0], "on_wait", getkey, make=program.__wrapped__)


def test_page_kernel_needs_a_token_major_cache(getkey):
    q, bounds, lengths = page_arguments(ARG_SPECS[0], getkey)
    with interpreted(), pytest.raises(NotImplementedError, match="needs a TokenMajor cache, got HeadMajor"):
        page_scores(q, from_heads("head_major", *bounds), lengths, page_size=4, implementation="pallas_tpu")


# the bounds


CAPACITY, HEADS, HEAD_DIM = 29, 2, 8  # neither a multiple of a page nor of what is built at once


@functools.cache
def build_at_once(page_size):
    return jax.jit(functools.partial(page_bounds, layer=LAYER, page_size=page_size), compiler_options=UNOPTIMISED)


@functools.cache
def build_token_by_token(page_size):
    def build(k, lengths, bounds):
        def add(bounds, token):
            # Rows that have ended write past the last page.
            slots = jnp.where(token < lengths, token, bounds.capacity * page_size)
            return update_page_bounds(bounds, slots, k[:, :, token], layer=LAYER, page_size=page_size), None

        return jax.lax.scan(add, bounds, jnp.arange(k.shape[2]))[0]

    return jax.jit(build, compiler_options=UNOPTIMISED)


def page_inputs(seed, lengths, layout, page_size):
    """Keys with NaN past the lengths, their cache, and bounds of NaN that are to be overwritten."""
    k = np.random.default_rng(seed).standard_normal((len(lengths), HEADS, CAPACITY, HEAD_DIM), np.float32)
    k = masked((np.arange(CAPACITY) < np.array(lengths)[:, None])[:, None, :, None], jnp.asarray(k), np.nan)
    pages = -(-CAPACITY // page_size)
    shape = {"layers": LAYERS, "batch": len(lengths), "kv_heads": HEADS, "capacity": pages, "head_dim": HEAD_DIM}
    nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), empty_cache(layout, **shape, dtype=jnp.float32))
    return k, stacked(layout, k, k), nothing


ragged = st.lists(st.integers(0, CAPACITY), min_size=3, max_size=3)


@pytest.mark.parametrize(("layout", "page_size"), [("head_major", 4), ("token_major", 4), ("token_major", 1)])
@settings(max_examples=8)
@given(lengths=ragged, seed=st.integers(0, 2**16))
def test_bounds_kept_token_by_token_are_those_built_at_once(layout, page_size, lengths, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_bounds_module, "TOKENS_AT_ONCE", 8)
        k, cache, nothing = page_inputs(seed, lengths, layout, page_size)
        built = build_at_once(page_size)(cache, jnp.array(lengths), nothing)
    kept = build_token_by_token(page_size)(k, jnp.array(lengths), nothing)
    values = np.asarray(k)
    built, kept = ([(np.asarray(x.keys(i)), np.asarray(x.values(i))) for i in range(LAYERS)] for x in (built, kept))
    for row, length in enumerate(lengths):
        used = -(-length // page_size)
        for page in range(used):
            tokens = values[row, :, page * page_size : min((page + 1) * page_size, length)]
            for minima, maxima in (built[LAYER], kept[LAYER]):
                np.testing.assert_array_equal(minima[row, :, page], tokens.min(axis=1))
                np.testing.assert_array_equal(maxima[row, :, page], tokens.max(axis=1))
        # Pages that were never in use: zeros, and what was there before.
        assert not any(x[row, :, used:].any() for x in built[LAYER])
        assert all(np.isnan(x[row, :, used:]).all() for x in kept[LAYER])
    for layer in set(range(LAYERS)) - {LAYER}:
        assert all(np.isnan(x).all() for x in (*built[layer], *kept[layer]))


@settings(max_examples=10)
@given(lengths=ragged, seed=st.integers(0, 2**16))
def test_no_token_is_above_the_score_of_its_page(lengths, seed):
    k, cache, nothing = page_inputs(seed, lengths, "head_major", PAGE_SIZE)
    q = jnp.asarray(np.random.default_rng(seed + 1).standard_normal((3, HEADS * 2, HEAD_DIM)), jnp.float32)
    bounds = build_at_once(PAGE_SIZE)(cache, jnp.array(lengths), nothing)
    score = program(page_scores, page_size=PAGE_SIZE, scale=1.0)
    pages = np.repeat(score(q, bounds, jnp.array(lengths), layer=LAYER), PAGE_SIZE, axis=2)[:, :, None, :CAPACITY]
    logits = np.einsum("bngd,bntd->bngt", np.asarray(q).reshape(3, HEADS, 2, HEAD_DIM), np.asarray(k))
    in_use = np.broadcast_to(np.arange(CAPACITY) < np.array(lengths)[:, None, None, None], logits.shape)
    assert np.all(logits[in_use] <= (np.broadcast_to(pages, logits.shape) + 1e-5)[in_use])


def test_a_page_of_one_token_scores_its_logit(getkey):
    lengths = (CAPACITY, 11, 0)
    k, cache, nothing = page_inputs(0, lengths, "head_major", 1)
    q = normal(getkey(), (3, HEADS * 2, HEAD_DIM), "float32")
    bounds = build_at_once(1)(cache, jnp.array(lengths), nothing)
    actual = program(page_scores, page_size=1, group_reduction="sum")(q, bounds, jnp.array(lengths), layer=LAYER)
    expected = program(chunk_scores, implementation="reference", group_reduction="sum")(q, k, jnp.array(lengths))
    assert_close(actual, expected, 3e-6)


@LAYOUTS
def test_an_update_writes_in_place(layout):
    cache = empty_cache(layout, layers=2, batch=2, kv_heads=2, capacity=512, head_dim=64, dtype=jnp.float32)
    update = jax.jit(functools.partial(update_page_bounds, page_size=16), donate_argnames="bounds")
    memory = update.lower(cache, jnp.zeros(2, jnp.int32), jnp.zeros((2, 2, 64)), layer=1).compile().memory_analysis()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 50


# chunk_scores


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_chunk_scores_worked_by_hand(implementation):
    # Query heads (1, 2) and (3, 0) against (1, 1), (-2, 1) and padding: 3, 0 and 3, -6.
    q = jnp.array([[[1.0, 2.0], [3.0, 0.0]]])
    chunks = jnp.array([[[[1.0, 1.0], [-2.0, 1.0], [jnp.nan, jnp.inf]]]])
    by_hand = {"max": [3, 0], "sum": [6, -6], "mean": [3, -3]}
    for group_reduction in by_hand if implementation == "reference" else ["max"]:
        score = program(chunk_scores, implementation=implementation, group_reduction=group_reduction, scale=0.5)
        actual = score(q, chunks, jnp.array([2]))
        expected = [x * 0.5 for x in by_hand[group_reduction]] + [-np.inf]
        np.testing.assert_allclose(actual, [[expected]], rtol=1e-6)


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_chunk_scores_match_oracle(implementation, spec, getkey):
    args = cache_arguments(spec, getkey)
    options = {"group_reduction": reduction(spec)}
    expected = program(chunk_scores, implementation="reference", **options)(args.q, args.k, args.lengths)
    in_use = np.arange(spec.tokens)[None, None, :] < np.array(spec.lengths)[:, None, None]
    np.testing.assert_array_equal(np.isfinite(expected), np.broadcast_to(in_use, expected.shape))
    score = program(chunk_scores, implementation=implementation, **options)
    assert_close(score(args.q, args.k_poisoned, args.lengths), expected, spec.tolerance)


def assert_chunk_kernel_matches(spec, dma, getkey, make=program):
    args = cache_arguments(spec, getkey)
    options = {"scale": 0.1, "group_reduction": "sum"}
    kernel = make(chunk_kernel.chunk_scores, dma, size=BLOCK, **options)
    expected = program(chunk_scores, implementation="xla", **options)(args.q, args.k, args.lengths)
    assert_close(kernel(args.q, args.k_poisoned, args.lengths), expected, spec.tolerance)


@pytest.mark.parametrize(("spec", "dma"), [(MANY_BLOCKS[0], "eager"), (MANY_BLOCKS[1], "on_wait")], ids=DMA_IDS)
def test_chunk_kernel_over_many_blocks(dma, spec, getkey):
    assert_chunk_kernel_matches(spec, dma, getkey)


def test_chunk_kernel_that_reads_the_next_block_is_noticed(monkeypatch, getkey):
    right = chunk_kernel._block_in_use
    wrong = lambda size, across, row, step, counts: right(size, across, row, step + 1, counts)  # noqa: E731
    monkeypatch.setattr(chunk_kernel, "_block_in_use", wrong)
    with pytest.raises(AssertionError, match=r"mismatch|Mismatch"):
        # Not from the cache of programs, nor into it.
        assert_chunk_kernel_matches(MANY_BLOCKS[0], "on_wait", getkey, make=program.__wrapped__)


def test_chunk_blocks_fill_tiles_of_lanes_and_stay_small():
    dtype = jnp.dtype("bfloat16")
    assert chunk_kernel.block_chunks(8, 100, 128, dtype) == 100
    size = chunk_kernel.block_chunks(8, 2048, 128, dtype)
    assert size % 128 == 0 and size * 8 * 128 * 2 == chunk_kernel.BLOCK_BYTES
    assert chunk_kernel.block_chunks(128, 2048, 256, dtype) == 128  # never below a tile


# mistakes


Q, LENGTHS = jnp.zeros((2, 4, 8)), jnp.array([10, 3])
CHUNKS = jnp.zeros((2, 2, 10, 8))
BOUNDS = from_heads("head_major", CHUNKS, CHUNKS)
TOKENS = from_heads("token_major", jnp.zeros((2, 2, 40, 8)), jnp.zeros((2, 2, 40, 8)))
PAGES = {"page_size": 4}
AT = {"page_size": 4, "layer": 0}

MISTAKES = (
    (page_scores, (Q[:, :3], BOUNDS, LENGTHS), PAGES, "q has 3 query heads and bounds has 2 kv heads"),
    (page_scores, (Q[..., :4], BOUNDS, LENGTHS), PAGES, r"q has shape \(2, 4, 4\) and bounds has .* head_dim 8"),
    (page_scores, (Q, BOUNDS, LENGTHS[:1]), PAGES, r"lengths has shape \(1,\); expected \(2,\), from the batch of q"),
    (page_scores, (Q, BOUNDS, LENGTHS + 31), PAGES, "lengths has values from 34 to 41; expected 0 to 40"),
    (page_scores, (Q, BOUNDS, LENGTHS), {"page_size": 0}, "page_size=0 is not a number of tokens; expected 1 or more"),
    (page_scores, (Q, BOUNDS, LENGTHS), {**PAGES, "layer": 1}, "layer has values from 1 to 1; expected 0 to 0"),
    (page_scores, (Q, BOUNDS, LENGTHS), {**PAGES, "group_reduction": "min"}, "group_reduction='min' .* max, mean, sum"),
    (page_scores, (Q, BOUNDS, LENGTHS), {**PAGES, "implementation": "fast"}, "implementation='fast' is not an impl"),
    (page_bounds, (TOKENS, LENGTHS, BOUNDS), {"page_size": 5, "layer": 0}, r"into .*10, 8, .*; expected \(1, 2, 2, 8"),
    (page_bounds, (TOKENS, LENGTHS + 31, BOUNDS), AT, "lengths has values from 34 to 41; expected 0 to 40"),
    (page_bounds, (TOKENS, LENGTHS[:1], BOUNDS), AT, r"lengths has shape \(1,\); expected \(2,\), from .* cache"),
    (page_bounds, (TOKENS, LENGTHS, BOUNDS), {"page_size": -4, "layer": 0}, "page_size=-4 is not a number"),
    (
        update_page_bounds,
        (BOUNDS, LENGTHS[:1], Q[:, :2]),
        AT,
        r"slots has shape \(1,\); expected \(2,\), from .* bounds",
    ),
    (update_page_bounds, (BOUNDS, LENGTHS, Q), AT, r"k has shape \(2, 4, 8\); expected \(2, 2, 8\), from bounds"),
    (chunk_scores, (Q[0], CHUNKS, LENGTHS), {}, r"q has shape \(4, 8\); expected 3 dimensions"),
    (chunk_scores, (Q, CHUNKS[0], LENGTHS), {}, r"chunks has shape \(2, 10, 8\); expected \[batch, kv_heads, chunks"),
    (chunk_scores, (Q[:1], CHUNKS, LENGTHS), {}, r"q has shape \(1, 4, 8\) and chunks has shape \(2, .* equal batch"),
    (chunk_scores, (Q[:, :3], CHUNKS, LENGTHS), {}, "q has 3 query heads and chunks has 2 kv heads"),
    (chunk_scores, (Q, CHUNKS, LENGTHS[:1]), {}, r"counts has shape \(1,\); expected \(2,\), from the batch of q"),
    (chunk_scores, (Q, CHUNKS, LENGTHS + 1), {}, "counts has values from 4 to 11; expected 0 to 10"),
    (chunk_scores, (Q, CHUNKS, LENGTHS), {"group_reduction": "first"}, "group_reduction='first' .* max, mean, sum"),
    (chunk_scores, (Q, CHUNKS, LENGTHS), {"implementation": "fast"}, "implementation='fast' is not an implementation"),
)


@pytest.mark.parametrize(
    ("operation", "args", "options", "message"),
    MISTAKES,
    ids=lambda x: x.__name__ if callable(x) else x if isinstance(x, str) else "",
)
def test_mistake_is_named(operation, args, options, message):
    # Unwrapped, because the suite checks annotations, and that would object to most of these first.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(operation)(*args, **options)
