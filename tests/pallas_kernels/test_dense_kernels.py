"""The kernels of decode_attention, token_scores and selection_attention: several blocks, both ways to run a DMA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import TokenMajor, decode_attention, dispatch, from_heads, interpreted, selection_attention
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
BLOCK = 128
SPECS = {
    "max": ArgSpec("gqa4_64_bfloat16", 4, 4, 64, "bfloat16", tokens=300, lengths=(300, 129, 0)),
    "mean": ArgSpec("gqa16_128_float32", 2, 16, 128, "float32", tokens=300, lengths=(256, 17, 300)),
    "sum": ArgSpec("gqa3_16_float32", 3, 3, 16, "float32", tokens=300, lengths=(1, 0, 128)),
}
by_reduction = pytest.mark.parametrize(("group_reduction", "spec"), SPECS.items(), ids=lambda x: getattr(x, "name", x))
by_dma = pytest.mark.parametrize("dma", ["eager", "on_wait"])


@functools.cache
def program(kernel, dma="on_wait", **options):
    """An implementation with small blocks, in the interpreter: races and reads out of bounds are errors."""
    compiled = jax.jit(functools.partial(kernel, tokens=BLOCK, **options), compiler_options=UNOPTIMISED)
    params = pltpu.InterpretParams(
        dma_execution_mode=dma, detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )

    def run(*args, **kwargs):
        with interpreted(params):
            return jax.block_until_ready(compiled(*args, **kwargs))

    return run


def scale(spec):
    return spec.head_dim**-0.5


def decode_program(spec, group_reduction, dma="on_wait"):
    options = {"scale": scale(spec), "return_scores": True, "group_reduction": group_reduction}
    return program(decode_kernel.decode_attention, dma, **options)


def check_decode(run, args, spec, group_reduction):
    # A query wider than the cache takes its dtype, and the result has the query's.
    q = args.q.astype(jnp.float32)
    oracle = jitted(decode_attention, return_scores=True, group_reduction=group_reduction, implementation="reference")
    expected = oracle(q, args.cache(), args.lengths, layer=LAYER)
    out, scores = run(q, args.poisoned("token_major"), args.lengths, layer=jnp.int32(LAYER))
    assert_close(out, expected[0], spec.tolerance)
    assert_close(scores, expected[1], 3e-6)  # logits of bfloat16 numbers are exact to float32


@by_dma
@by_reduction
def test_decode_attention_over_blocks(group_reduction, spec, dma, getkey):
    run = decode_program(spec, group_reduction, dma)
    check_decode(run, cache_arguments(spec, getkey), spec, group_reduction)


@by_dma
@by_reduction
def test_token_scores_over_blocks(group_reduction, spec, dma, getkey):
    args = cache_arguments(spec, getkey)
    check_scores(program(scores_kernel.token_scores, dma, **scores_options(spec, group_reduction)), args, spec)


def scores_options(spec, group_reduction):
    return {"scale": scale(spec), "group_reduction": group_reduction}
