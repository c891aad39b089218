"""Caches whose layers stand apart: what a stack gives, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels import HeadMajor, PerLayer, dispatch
from tests.pallas_kernels.arg_specs import ARG_SPECS, LAYER, assert_close, cache_arguments


def arguments(getkey):
    args = cache_arguments(ARG_SPECS[2], getkey)
    stack = args.cache()
    stack = jax.tree.map(lambda x: jnp.nan_to_num(x), stack)  # the layers beside the one in use
    return args, stack, PerLayer.of(stack)


def same(apart: PerLayer, stack: HeadMajor) -> None:
    assert apart.shape == stack.shape
    for layer in range(stack.layers):
        np.testing.assert_array_equal(apart.keys(layer), stack.keys(layer))
        np.testing.assert_array_equal(apart.values(layer), stack.values(layer))


def test_reads_and_writes_what_a_stack_does(getkey):
    _, stack, apart = arguments(getkey)
    same(apart, stack)
    tokens = jax.random.normal(getkey(), (2, 3, 3, 5, 16))
    slots = jnp.array([[[1, 3]], [[0, 39]], [[7, 8]]]).repeat(3, axis=1)
    for ours, theirs in (
        (apart.block(LAYER, 4, 8), stack.block(LAYER, 4, 8)),
        (apart.gather(LAYER, slots), stack.gather(LAYER, slots)),
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    np.testing.assert_array_equal(stack.gather(LAYER, slots)[0][1, 2, 1], stack.keys(LAYER)[1, 2, 39])
    same(apart.write(LAYER, 6, *tokens), stack.write(LAYER, 6, *tokens))
    past = jnp.array([0, 39, 40])  # the last row writes nothing
    same(apart.append(LAYER, past, *tokens[:, :, :, 0]), stack.append(LAYER, past, *tokens[:, :, :, 0]))
    same(apart.empty_like(capacity=8), stack.empty_like(capacity=8))


def test_every_operation_gives_what_it_gives_of_a_stack(getkey):
    args, stack, apart = arguments(getkey)
    positions = jnp.tile(jnp.array([3, -1, 0, 6]), (3, 3, 1))
    chunk = jax.random.normal(getkey(), (3, 12, 8, 16))

    def results(cache):
        run = {"layer": LAYER, "implementation": "xla"}
        compact = ops.gather_selection(cache, positions, cache.empty_like(capacity=4), **run)
        return (
            ops.decode_attention(args.q, cache, args.lengths, **run),
            ops.token_scores(args.q, cache, args.lengths, **run),
            ops.gather_attention(args.q, cache, positions, **run),
            ops.selection_attention(args.q, compact, positions >= 0, **run),
            ops.prefill_attention(chunk, cache, jnp.array([32, 0, 3]), **run),
            compact.keys(LAYER),
        )

    for ours, theirs in zip(jax.jit(results)(apart), jax.jit(results)(stack), strict=True):
        assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize(
    ("change", "layer", "message"),
    [
        (lambda c: c, jnp.int32(1), "layer is a .*; expected an int, which names a layer of a PerLayer cache"),
        (lambda c: PerLayer(c.k[:2], c.v), 1, "2 layers of keys and 3 of values; expected as many"),
        (
            lambda c: jax.tree.map(lambda x: x[:, :1] if x is c.k[2] else x, c),
            1,
            r"float32\[3, 1, 40, 16\], .*; expected one shape",
        ),
    ],
)
def test_bad_input_is_named(change, layer, message, getkey):
    args, _, apart = arguments(getkey)
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(args.q, change(apart), args.lengths, layer=layer)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_only_large_layers_on_a_cpu_are_taken_apart(platform, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    sizes = {"layers": 2, "batch": 1, "kv_heads": 2, "head_dim": 64, "dtype": jnp.float32}
    make = functools.partial(ops.empty_cache, "head_major", **sizes)
    small, large = make(capacity=128), make(capacity=dispatch.APART_BYTES // (2 * 2 * 64 * 4))
    assert isinstance(ops.for_decoding(small), HeadMajor)
    assert isinstance(ops.for_decoding(large), PerLayer if platform == "cpu" else HeadMajor)
