"""The kernels of decode_attention, token_scores and selection_attention: several blocks, both ways to run a DMA."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    TokenMajor,
    decode_attention,
    dispatch,
    empty_cache,
    from_heads,
    interpreted,
    selection_attention,
    token_scores,
)
from pallas_kernels.cache import LANES
from pallas_kernels.ops import running_softmax, token_major
from pallas_kernels.ops.decode_attention import pallas_tpu as decode_kernel
from pallas_kernels.ops.selection_attention import pallas_tpu as selection_kernel
from pallas_kernels.ops.token_scores import pallas_tpu as scores_kernel
from tests.pallas_kernels.arg_specs import (
    LAYER,
    ArgSpec,
    assert_close,
    cache_arguments,
    generator,
    jitted,
    masked,
    normal,
    stacked,
)

# Programs run once or a few times: what optimising them costs would not come back.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Three blocks, of which the last is cut short by the capacity; rows that end in each of them, at their first and last
# tokens too. Heads that share rows of lanes, rows that share words of memory, and groups that fill no tile or two.
BLOCK = {300: 128, 1100: 512}  # by the capacity; scores are written eight tiles of 128 at a time and then singly
SPECS = {
    "max": ArgSpec("gqa4_64_bfloat16", 4, 4, 64, "bfloat16", tokens=300, lengths=(300, 129, 0)),
    "mean": ArgSpec("gqa16_128_float32", 2, 16, 128, "float32", tokens=300, lengths=(256, 17, 300)),
    "sum": ArgSpec("gqa3_16_float32", 3, 3, 16, "float32", tokens=1100, lengths=(1, 0, 1050)),
    "none": ArgSpec("gqa4_64_float32", 2, 4, 64, "float32", tokens=300, lengths=(0, 130, 300)),
}
# Copies made when they are started and when they are waited for: the same program twice, so one spec is enough.
over_blocks = pytest.mark.parametrize(
    ("group_reduction", "dma"), [(name, "on_wait") for name in SPECS] + [("max", "eager")]
)


@functools.cache
def program(kernel, spec, dma="on_wait", broken=None, **options):
    """An implementation with small blocks, in the interpreter: races and reads out of bounds are errors.

    `broken` names the variant that a test has put in place, so that nobody else gets its program.
    """
    compiled = jax.jit(
        functools.partial(kernel, scale=spec.head_dim**-0.5, tokens=BLOCK[spec.tokens], **options),
        compiler_options=UNOPTIMISED,
    )
    params = pltpu.InterpretParams(
        dma_execution_mode=dma, detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )

    def run(*args, **kwargs):
        with interpreted(params):
            return jax.block_until_ready(compiled(*args, **kwargs))

    return run


def spec_of_shapes(spec):
    """One for all lengths, which are no part of a program."""
    return dataclasses.replace(spec, lengths=())


def clean(args):
    return from_heads("head_major", args.k, args.v)


def check_decode(spec, group_reduction, args, dma="on_wait", broken=None):
    """The outputs and the scores of decode_attention, from a cache whose other layers and padding hold NaN."""
    # A query wider than the cache takes its dtype, and the result has the query's.
    q = args.q.astype(jnp.float32)
    oracle = jitted(decode_attention, return_scores=True, group_reduction=group_reduction, implementation="reference")
    expected = oracle(q, clean(args), args.lengths, layer=0)
    attend = program(
        decode_kernel.decode_attention,
        spec_of_shapes(spec),
        dma,
        broken,
        return_scores=True,
        group_reduction=group_reduction,
    )
    out, scores = attend(q, args.poisoned("token_major"), args.lengths, layer=jnp.int32(LAYER))
    assert_close(out, expected[0], spec.tolerance)
    # The products of bfloat16 numbers are summed in float32: their scores are as good as float32's.
    assert_close(scores, expected[1], 3e-6)


def check_scores(spec, group_reduction, args, dma="on_wait", broken=None):
    oracle = jitted(token_scores, group_reduction=group_reduction, implementation="reference")
    score = program(scores_kernel.token_scores, spec_of_shapes(spec), dma, broken, group_reduction=group_reduction)
    scores = score(args.q, args.poisoned("token_major"), args.lengths, layer=jnp.int32(LAYER))
    assert_close(scores, oracle(args.q, clean(args), args.lengths, layer=0), 3e-6)


def selection_arguments(spec, args, key, shared):
    """Which entries are valid, per kv head or for all, and a selection poisoned elsewhere. A head has none."""
    heads = 1 if shared else spec.kv_heads
    valid = generator(key).random((spec.batch, heads, spec.tokens)) < 0.5
    valid[0, -1] = False
    k, v = (np.asarray(x, np.float32) for x in (args.k, args.v))
    keep = np.broadcast_to(valid[..., None], k.shape)
    k, v = masked(keep, k, np.nan).astype(spec.dtype), masked(keep, v, 1e30).astype(spec.dtype)
    return jnp.asarray(valid), stacked("token_major", k, v)


def check_selection(spec, args, key, dma="on_wait", shared=False, broken=None):
    valid, poisoned = selection_arguments(spec, args, key, shared)
    attend = program(selection_kernel.selection_attention, spec_of_shapes(spec), dma, broken)
    out, _ = attend(args.q, poisoned, valid, layer=jnp.int32(LAYER))
    assert_close(
        out, jitted(selection_attention, implementation="reference")(args.q, clean(args), valid), spec.tolerance
    )
    nothing = out[0] if shared else out[0, -spec.group :]
    assert not np.asarray(nothing, np.float32).any()


@over_blocks
def test_decode_attention_over_blocks(group_reduction, dma, getkey):
    spec = SPECS[group_reduction]
    check_decode(spec, group_reduction, cache_arguments(spec, getkey), dma)


@over_blocks
def test_token_scores_over_blocks(group_reduction, dma, getkey):
    spec = SPECS[group_reduction]
    check_scores(spec, group_reduction, cache_arguments(spec, getkey), dma)


@over_blocks
def test_selection_attention_over_blocks(group_reduction, dma, getkey):
    spec = SPECS[group_reduction]
    check_selection(spec, cache_arguments(spec, getkey), getkey(), dma, shared=group_reduction == "mean")


SMALL = SPECS["sum"]


@settings(max_examples=4)
@given(lengths=st.tuples(*[st.integers(0, SMALL.tokens)] * 3), seed=st.integers(0, 2**16))
def test_decode_attention_for_any_lengths(lengths, seed):
    spec = dataclasses.replace(SMALL, lengths=lengths)
    keys = itertools.count(seed)
    check_decode(spec, "sum", cache_arguments(spec, lambda: jax.random.key(next(keys))))


@settings(max_examples=4)
@given(lengths=st.tuples(*[st.integers(0, SMALL.tokens)] * 3), seed=st.integers(0, 2**16))
def test_token_scores_for_any_lengths(lengths, seed):
    spec = dataclasses.replace(SMALL, lengths=lengths)
    keys = itertools.count(seed)
    check_scores(spec, "sum", cache_arguments(spec, lambda: jax.random.key(next(keys))))


def test_gradients_of_selection_attention(getkey):
    """For the query and for the keys and values of the layer in use; nothing for the layers beside it."""
    spec = ArgSpec("gqa2_16_float32", 4, 2, 16, "float32", tokens=200, lengths=(200, 200))
    args = cache_arguments(spec, getkey)
    valid, _ = selection_arguments(spec, args, getkey(), shared=False)
    selection = stacked("token_major", args.k, args.v)
    direction = normal(getkey(), args.q.shape, "float32")

    def gradients(attend):
        def along(q, selection):
            return jnp.sum(direction * attend(q, selection, valid, layer=jnp.int32(LAYER)))

        return jax.grad(along, argnums=(0, 1))

    reference = functools.partial(selection_attention, implementation="reference")
    expected_q, expected_selection = jax.jit(gradients(reference))(args.q, selection)

    def kernel(*args, **options):
        return selection_kernel.selection_attention(*args, scale=spec.head_dim**-0.5, tokens=128, **options)[0]

    with interpreted():
        actual_q, actual_selection = jax.block_until_ready(jax.jit(gradients(kernel))(args.q, selection))
    assert np.abs(expected_q).max() > 0.1
    assert_close(actual_q, expected_q, 1e-5)
    assert_close(actual_selection.kv[LAYER], expected_selection.kv[LAYER], 1e-5)
    assert not np.asarray(actual_selection.kv[LAYER + 1]).any()


# Broken variants, each caught by the checks above.


def one_block_early(tokens, row, step, layer, lengths, block_in_use=token_major.block_in_use):
    layer, row, block, *rest = block_in_use(tokens, row, step, layer, lengths)
    return layer, row, jnp.maximum(block - 1, 0), *rest


def next_layer(row, step, layer, block_of_step=selection_kernel.block_of_step):
    layer, *rest = block_of_step(row, step, layer)
    return layer + 1, *rest


def all_visible(state, logits, visible, add_block=running_softmax.add_block):
    return add_block(state, logits, jnp.ones_like(visible))


def no_end_of_cache(weights, block, rows, *, capacity, first, block_sums=token_major.block_sums):
    return block_sums(weights, block, rows, capacity=block.shape[2], first=first)


def keys_as_they_are(q, block, rows, *, finite=False, block_logits=token_major.block_logits):
    return block_logits(q, block, rows)


def kept_one_block_late(kept, logits, block, keep=running_softmax.keep):
    keep(kept, logits, jnp.minimum(block + 1, 2))


MAX, MEAN, SUM = SPECS["max"], SPECS["mean"], SPECS["sum"]


@pytest.mark.parametrize(
    ("module", "name", "variant", "check"),
    [
        (token_major, "block_in_use", one_block_early, functools.partial(check_decode, SUM, "sum")),
        (token_major, "block_sums", no_end_of_cache, functools.partial(check_decode, MEAN, "mean")),
        (running_softmax, "keep", kept_one_block_late, functools.partial(check_scores, MEAN, "mean")),
        (selection_kernel, "block_of_step", next_layer, functools.partial(check_selection, SUM, key=jax.random.key(7))),
        (running_softmax, "add_block", all_visible, functools.partial(check_selection, SUM, key=jax.random.key(7))),
        (token_major, "block_logits", keys_as_they_are, functools.partial(check_selection, MAX, key=jax.random.key(7))),
    ],
    ids=lambda x: x.func.__name__ if isinstance(x, functools.partial) else getattr(x, "__name__", x).split(".")[-1],
)
def test_a_broken_kernel_is_caught(module, name, variant, check, getkey, monkeypatch):
    monkeypatch.setattr(module, name, variant)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(args=cache_arguments(check.args[0], getkey), broken=f"{name} is {variant.__name__}")


# What the interpreter does not do: a row of bfloat16 heads is read from memory as words.


@pytest.mark.parametrize("keys_only", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rows"), [("bfloat16", 1), ("bfloat16", 4), ("bfloat16", 6), ("float32", 1), ("float32", 3)]
)
def test_rows_read_as_words(dtype, rows, keys_only, getkey, monkeypatch):
    tokens, some = 48, slice(16, 40)
    cache = TokenMajor(normal(getkey(), (1, 1, tokens, 2, rows, LANES), dtype), pack=1)
    cache = TokenMajor(cache.kv.at[0, 0, 20, :, 0, 5].set(jnp.nan), pack=1)
    shape = token_major.block_shape(cache, tokens, keys_only=keys_only)
    both = shape[3] * shape[4] == 2 * rows
    read = range(2 * rows if both else rows)

    def kernel(block, out):
        for index in read:
            out[index] = token_major.reader(block, some, finite=True)(index).astype(jnp.float32)

    # JAX's other interpreter has references viewed as words.
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    out = pl.pallas_call(
        kernel,
        grid=(1,),
        in_specs=[pl.BlockSpec(shape, lambda _: (0,) * 6)],
        out_specs=pl.BlockSpec((len(read), some.stop - some.start, LANES), lambda _: (0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((len(read), some.stop - some.start, LANES), jnp.float32),
        interpret=True,
    )(token_major.stored(cache))
    expected = np.asarray(cache.kv, np.float32)[0, 0, some].reshape(some.stop - some.start, 2 * rows, LANES)
    np.testing.assert_array_equal(out, np.nan_to_num(np.swapaxes(expected, 0, 1)[: len(read)]))


# Limits


def test_blocks_divide_the_capacity_where_they_can():
    def tokens(capacity, block_bytes):
        sizes = {"layers": 1, "batch": 1, "kv_heads": 8, "capacity": capacity, "head_dim": 128}  # 4 KiB per token
        cache = jax.eval_shape(functools.partial(empty_cache, "token_major", dtype=jnp.bfloat16, **sizes))
        return token_major.block_tokens(cache, block_bytes)

    assert tokens(131072, 2**22) == 1024
    assert tokens(4096 + 512, 2**22) == 768  # six blocks
    assert tokens(128 * 31, 2**22) == 1024  # 31 is a prime: a last block of 896
    assert tokens(1000, 2**22) == 1000
    assert tokens(1000, 2**10) == LANES


@pytest.mark.parametrize("kernel", ["decode_attention", "token_scores", "selection_attention"])
def test_memory_does_not_grow_with_the_batch(kernel, monkeypatch):
    limits = []

    def compiler_params(*args, compiler_params=token_major.compiler_params, **options):
        limits.append(compiler_params(*args, **options))
        return limits[-1]

    monkeypatch.setattr(token_major, "compiler_params", compiler_params)
    for batch in (1, 64):
        spec = dataclasses.replace(SUM, lengths=(1,) * batch)
        cache = jax.eval_shape(lambda spec=spec: empty_cache("token_major", **sizes(spec)))
        q = jax.ShapeDtypeStruct((batch, spec.kv_heads * spec.group, spec.head_dim), spec.dtype)
        rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
        valid = jax.ShapeDtypeStruct((batch, spec.kv_heads, spec.tokens), jnp.bool_)
        scores = {"scale": 1.0, "group_reduction": "max"}
        traced, last = {
            "decode_attention": (
                functools.partial(decode_kernel.decode_attention, return_scores=True, layer=0, **scores),
                rows,
            ),
            "token_scores": (functools.partial(scores_kernel.token_scores, layer=0, **scores), rows),
            "selection_attention": (
                functools.partial(selection_kernel.selection_attention, layer=0, scale=1.0),
                valid,
            ),
        }[kernel]
        with interpreted():
            jax.eval_shape(traced, q, cache, last)
    assert limits[0].vmem_limit_bytes == limits[-1].vmem_limit_bytes > token_major.COMPILER_BYTES


def sizes(spec):
    """Arguments of `empty_cache`."""
    batch = len(spec.lengths)
    shape = {"kv_heads": spec.kv_heads, "capacity": spec.tokens, "head_dim": spec.head_dim, "dtype": spec.dtype}
    return {"layers": 1, "batch": batch, **shape}


def on_tpu(cache):
    return token_major.require_token_major(cache, "decode_attention")


def test_what_a_kernel_declines(getkey, monkeypatch):
    k = normal(getkey(), (1, 3, 4, 64), "bfloat16")
    with pytest.raises(NotImplementedError, match="needs a TokenMajor cache, got HeadMajor"):
        on_tpu(from_heads("head_major", k, k))
    half = from_heads("token_major", k.astype(jnp.float16), k.astype(jnp.float16))
    with pytest.raises(NotImplementedError, match="needs a bfloat16 or float32 cache, got float16"):
        on_tpu(half)
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    with pytest.raises(NotImplementedError, match="needs rows of 128 lanes, got 64: kv_heads=3 of head_dim=64"):
        on_tpu(from_heads("token_major", k, k))
    wide = normal(getkey(), (1, 3, 4, 128), "bfloat16")
    with pytest.raises(NotImplementedError, match="needs one row or an even number of them, got 3"):
        on_tpu(from_heads("token_major", wide, wide))
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: types.SimpleNamespace(vmem_capacity_bytes=64 * 2**20))
    scratch = running_softmax.kept_logits(query_heads=128, blocks=1, tokens=131072)
    with pytest.raises(NotImplementedError, match=r"token_scores on TPU needs 72 MiB of VMEM .* the chip has 64 MiB"):
        token_major.compiler_params("token_scores", blocks=[], scratch=[scratch])
