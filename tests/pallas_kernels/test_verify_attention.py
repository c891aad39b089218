"""verify_attention: several query steps at the end of a ragged cache, by every implementation, of every cache."""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from pallas_kernels import (
    Int8HeadMajor,
    decode_attention,
    from_heads,
    interpreted,
    on_mesh,
    verify_attention,
)
from pallas_kernels.int8_cache import dequantize, quantize
from pallas_kernels.ops import token_major
from pallas_kernels.ops.verify_attention import pallas_tpu, tpu_queries, tpu_scores
from tests.pallas_kernels.arg_specs import (
    IMPLEMENTATIONS_AND_LAYOUTS,
    LAYER,
    TOLERANCE,
    assert_close,
    jitted,
    masked,
    normal,
    stacked,
)

# Programs run a few times: optimising them would not pay.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True)
class Spec:
    """Shapes of several query steps over a ragged cache."""

    kv_heads: int
    group: int
    head_dim: int
    dtype: str
    steps: int
    capacity: int

    def arguments(self, starts, getkey):
        """q, start, clean keys and values, and such with NaN for keys and huge values behind the last step."""
        shape = (len(starts), self.kv_heads, self.capacity, self.head_dim)
        q = 2 * normal(getkey(), (len(starts), self.kv_heads * self.group, self.steps, self.head_dim), self.dtype)
        k, v = (normal(getkey(), shape, self.dtype) for _ in "kv")
        written = (np.arange(self.capacity) < np.array(starts)[:, None] + self.steps)[:, None, :, None]
        clean = (masked(written, k, 0), masked(written, v, 0))
        return q, jnp.array(starts, jnp.int32), clean, (masked(written, k, np.nan), masked(written, v, 1e30))


def step_by_step(q, cache, start, **options):
    """What the steps give one after the other: the outputs, and the scores."""
    decode = jitted(decode_attention, return_scores=True, implementation="reference", **options)
    steps = range(q.shape[2])
    found = [decode(q[:, :, step], cache, jnp.minimum(start + step + 1, cache.capacity)) for step in steps]
    return jnp.stack([out for out, _ in found], axis=2), jnp.stack([scores for _, scores in found], axis=1)


def check(actual, expected, dtype):
    assert_close(actual[0], expected[0], TOLERANCE[dtype])
    # The products of bfloat16 numbers are summed in float32: their scores are as good as float32's.
    assert_close(actual[1], expected[1], TOLERANCE["float32"])


# Row after row: the beginning, somewhere, the last slots of all; past them, where a finished row may stand.
SPECS = {
    "max": (Spec(2, 2, 64, "float32", steps=3, capacity=24), (0, 9, 21)),
    "mean": (Spec(1, 4, 128, "bfloat16", steps=2, capacity=40), (17, 38)),
    "sum": (Spec(3, 3, 16, "float32", steps=5, capacity=33), (33, 4, 31)),
    "none": (Spec(2, 1, 64, "bfloat16", steps=9, capacity=9), (0, 0)),
}


@pytest.mark.parametrize("group_reduction", SPECS)
@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_gives_what_the_steps_give_one_by_one(implementation, layout, group_reduction, getkey):
    spec, starts = SPECS[group_reduction]
    q, start, clean, poisoned = spec.arguments(starts, getkey)
    verify = jitted(
        verify_attention, return_scores=True, group_reduction=group_reduction, implementation=implementation
    )
    cache = stacked(layout, *(clean if implementation == "reference" else poisoned))
    expected = step_by_step(q, from_heads("head_major", *clean), start, group_reduction=group_reduction)
    check(verify(q, cache, start, layer=LAYER), expected, spec.dtype)


@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_one_step_is_decode_attention(implementation, layout, getkey):
    spec = Spec(2, 3, 64, "float32", steps=1, capacity=30)
    q, start, clean, _ = spec.arguments((29, 0, 11), getkey)
    cache = from_heads(layout, *clean)
    alone = jitted(verify_attention, implementation=implementation)(q, cache, start)
    out, scores = jitted(verify_attention, return_scores=True, implementation=implementation)(q, cache, start)
    decode = jitted(decode_attention, return_scores=True, implementation=implementation)
    decoded = decode(q[:, :, 0], cache, start + 1)
    check((out[:, :, 0], scores[:, 0]), decoded, spec.dtype)
    assert_close(alone, out, TOLERANCE[spec.dtype])


# One kv head with one query head, head_dim 1, scale 1, steps in slots 1 and 2 of four.
#   step 0: q = 1, logits 0, ln 3:       weights 1, 3    of 4; out = (1*8 + 3*16) / 4 = 14
#   step 1: q = 2, logits 0, ln 9, ln 2: weights 1, 9, 2 of 12; out = (1*8 + 9*16 + 2*2) / 12 = 13
@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_worked_by_hand(implementation, layout):
    q = jnp.array([[[[1.0], [2.0]]]])
    keys = jnp.array([[[[0.0], [math.log(3)], [math.log(2) / 2], [np.nan if implementation != "reference" else 0]]]])
    cache = from_heads(layout, keys, jnp.array([[[[8.0], [16.0], [2.0], [1e30]]]]))
    verify = jitted(verify_attention, scale=1.0, return_scores=True, implementation=implementation)
    out, scores = verify(q, cache, jnp.array([1]))
    np.testing.assert_allclose(out[0, 0, :, 0], [14, 13], rtol=1e-6)
    np.testing.assert_allclose(scores[0, :, 0], [[1 / 4, 3 / 4, 0, 0], [1 / 12, 9 / 12, 2 / 12, 0]], rtol=1e-6)


@settings(max_examples=5)
@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    head_dim=st.sampled_from([1, 8, 64]),
    steps=st.integers(1, 17),
    beyond=st.integers(0, 30),
    layout=st.sampled_from(["head_major", "token_major", "per_layer"]),
    seed=st.integers(0, 2**16),
)
def test_any_shapes(heads, head_dim, steps, beyond, layout, seed):
    spec = Spec(heads[0], heads[1], head_dim, "float32", steps, capacity=steps + beyond)
    keys = itertools.count(seed)
    starts = (seed % (spec.capacity + 1), beyond)
    q, start, clean, poisoned = spec.arguments(starts, lambda: jax.random.key(next(keys)))
    attend = functools.partial(verify_attention, return_scores=True)

    def both(q, clean, poisoned, start):
        return attend(q, clean, start, implementation="reference"), attend(q, poisoned, start, implementation="xla")

    caches = from_heads("head_major", *clean), from_heads(layout, *poisoned)
    expected, found = jax.jit(both, compiler_options=UNOPTIMISED)(q, *caches, start)
    check(found, expected, spec.dtype)


def test_a_cache_in_int8(getkey):
    spec, starts = SPECS["sum"]
    q, start, (k, v), _ = spec.arguments(starts, getkey)
    sizes = {"batch": len(starts), "kv_heads": spec.kv_heads, "capacity": spec.capacity, "head_dim": spec.head_dim}
    cache = Int8HeadMajor.empty(layers=1, **sizes, dtype=jnp.float32).write(0, 0, k, v)
    found = jitted(verify_attention, return_scores=True)(q, cache, start)
    rounded = from_heads("head_major", *(dequantize(*quantize(x), jnp.float32) for x in (k, v)))
    expected = step_by_step(q, rounded, start)
    assert_close(found[0], expected[0], 1e-5)
    assert_close(found[1], expected[1], 1e-5)


@pytest.mark.parametrize("group_reduction", ["max", "none"])
@pytest.mark.parametrize("layout", ["head_major", "token_major"])
def test_slots_divided_over_a_mesh(layout, group_reduction, getkey):
    """Some steps' own slots lie in another part than others', and the last part is empty for some rows."""
    spec = Spec(2, 2, 16, "float32", steps=5, capacity=32)
    q, start, clean, _ = spec.arguments((0, 5, 14, 32), getkey)
    cache = from_heads(layout, *clean)
    expected = step_by_step(q, cache, start, group_reduction=group_reduction)

    @jax.jit
    def divided(q, cache, start):
        return verify_attention(q, on_mesh(cache), start, return_scores=True, group_reduction=group_reduction)

    mesh = jax.make_mesh((2, 4), ("tensor", "sequence"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        found = divided(q, cache, start)
    assert len(found[1].sharding.device_set) == 8
    check(found, expected, spec.dtype)


# The kernel: three blocks, of which the last is cut short by the capacity; steps on both sides of a border between
# blocks; the logits of all blocks kept, or of some, or of none. Heads that share rows of lanes, rows that share words
# of memory, queries that fill no tile.
BLOCK = 128
DMA = Literal["eager", "on_wait"]
OVER_BLOCKS = {
    "some": (Spec(2, 2, 64, "bfloat16", steps=3, capacity=300), (126, 0, 298), "max", 1),
    "none": (Spec(2, 3, 128, "float32", steps=2, capacity=300), (255, 128, 300), "none", 0),
    "all": (Spec(1, 1, 128, "float32", steps=5, capacity=256), (250, 123, 64), "mean", 2),
}


@functools.cache
def kernel(spec, group_reduction, kept, dma: DMA = "on_wait", broken=None):
    """With small blocks, in the interpreter. `broken` names the variant in place: nobody else gets its program."""
    compiled = jax.jit(
        functools.partial(
            pallas_tpu.verify_attention,
            layer=LAYER,
            scale=spec.head_dim**-0.5,
            return_scores=True,
            group_reduction=group_reduction,
            tokens=BLOCK,
            kept=kept,
        ),
        compiler_options=UNOPTIMISED,
    )
    params = pltpu.InterpretParams(
        dma_execution_mode=dma, detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )

    def run(*args):
        with interpreted(params):
            out, scores = jax.block_until_ready(compiled(*args))
        return out, scores.swapaxes(1, 2)

    return run


def check_over_blocks(name, getkey, dma: DMA = "on_wait", broken=None, starts=None):
    spec, usual, group_reduction, kept = OVER_BLOCKS[name]
    q, start, clean, poisoned = spec.arguments(starts or usual, getkey)
    oracle = jitted(verify_attention, return_scores=True, group_reduction=group_reduction, implementation="reference")
    expected = oracle(q, from_heads("head_major", *clean), start)
    found = kernel(spec, group_reduction, kept, dma, broken)(q, stacked("token_major", *poisoned), start)
    check(found, expected, spec.dtype)


@pytest.mark.parametrize(
    ("name", "dma"), [("some", "on_wait"), ("some", "eager"), ("none", "on_wait"), ("all", "on_wait")]
)
def test_kernel_over_blocks(name, dma, getkey):
    check_over_blocks(name, getkey, dma)


@settings(max_examples=3)
@given(starts=st.tuples(*[st.integers(0, 300)] * 3), seed=st.integers(0, 2**16))
def test_kernel_for_any_starts(starts, seed):
    keys = itertools.count(seed)
    check_over_blocks("some", lambda: jax.random.key(next(keys)), starts=starts)


# Broken variants, each caught by the checks above.


def one_slot_more(*args, first_own, keep=tpu_queries.keep, **options):
    keep(*args, first_own=first_own + 1, **options)


def one_block_early(tokens, row, step, layer, lengths, block_in_use=token_major.block_in_use):
    layer, row, block, *rest = block_in_use(tokens, row, step, layer, lengths)
    return layer, row, jnp.maximum(block - 1, 0), *rest


def first_place(piece, logits, place, *args, probabilities=tpu_scores.probabilities):
    probabilities(piece, logits, 0, *args)


@pytest.mark.parametrize(
    ("module", "name", "variant"),
    [
        (tpu_queries, "keep", one_slot_more),
        (token_major, "block_in_use", one_block_early),
        (tpu_scores, "probabilities", first_place),
    ],
    ids=lambda x: getattr(x, "__name__", x).split(".")[-1],
)
def test_a_broken_kernel_is_caught(module, name, variant, getkey, monkeypatch):
    monkeypatch.setattr(module, name, variant)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_over_blocks("some", getkey, broken=variant.__name__)


def test_logits_are_kept_as_far_as_the_memory_goes():
    """Llama-3.1-8B with 131,072 slots: those of 9 steps, 40 of 320 in a tile of theirs, take 160 MiB."""
    spec = Spec(8, 4, 128, "bfloat16", steps=9, capacity=131072)
    shape = jax.ShapeDtypeStruct((1, spec.kv_heads, spec.capacity, spec.head_dim), spec.dtype)
    cache = jax.eval_shape(functools.partial(from_heads, "token_major"), shape, shape)

    def blocks(vmem, steps, heads=8):
        queries = tpu_queries.arrange(cache, 32, steps)
        tokens = pallas_tpu.block_tokens(cache, queries)
        kept = pallas_tpu.kept_blocks(cache, queries, heads, jnp.dtype(spec.dtype), tokens, vmem)
        places = pallas_tpu.scratch_shapes(cache, queries, heads, tokens, min(kept + 1, spec.capacity // tokens))
        limit = pallas_tpu.compiler_params(cache, queries, jnp.dtype(spec.dtype), tokens, places).vmem_limit_bytes
        assert limit <= vmem
        return kept * tokens / spec.capacity

    assert 0.5 < blocks(128 * 2**20, steps=9) < 0.6
    assert 0 < blocks(64 * 2**20, steps=9) < 0.3
    assert blocks(128 * 2**20, steps=2) == 1.0
    assert blocks(128 * 2**20, steps=9, heads=0) == 0
    assert blocks(64 * 2**20, steps=17) > 0
    # A group of queries fills tiles with nothing of another row of the cache.
    assert tpu_queries.arrange(cache, 32, 9) == (8, 4, 9, 40)
