"""The int8 cache: what rounding does to a token, and that operations give what they give of the rounded tokens."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import pallas_kernels as ops
from pallas_kernels import HeadMajor, Int8HeadMajor, interpreted
from pallas_kernels.int8_cache import dequantize, quantize
from pallas_kernels.ops import cache_products
from tests.pallas_kernels.arg_specs import ARG_SPECS, LAYER, LAYERS, assert_close, cache_arguments

SPECS = {spec.name: spec for spec in ARG_SPECS}


def filled(k, v) -> Int8HeadMajor:
    """A cache whose layer `LAYER` holds k and v, between two of numbers that would spoil every result."""
    batch, kv_heads, capacity, head_dim = k.shape
    sizes = {"batch": batch, "kv_heads": kv_heads, "capacity": capacity, "head_dim": head_dim}
    cache = Int8HeadMajor.empty(layers=LAYERS, **sizes, dtype=k.dtype)
    for layer in range(LAYERS):
        cache = cache.write(layer, 0, *((k, v) if layer == LAYER else (jnp.full_like(k, 1e6),) * 2))
    return cache


def rounded(cache: Int8HeadMajor) -> HeadMajor:
    """The same numbers, float32."""
    wide = [
        jnp.stack([dequantize(multiples[layer], scales[layer], jnp.float32) for layer in range(LAYERS)])
        for multiples, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales))
    ]
    return HeadMajor(*wide)


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=4, max_size=4))
def test_no_channel_moves_by_more_than_half_a_step(channels):
    vector = np.array(channels, np.float32)
    multiples, scale = quantize(jnp.asarray(vector)[None])
    back = np.asarray(dequantize(multiples, scale, jnp.float32), np.float64)[0]
    largest = np.abs(vector).max().astype(np.float64)
    # Below 127 times the smallest normal number all is 0.
    assert np.all(np.abs(back - vector) <= max(largest / 254 * (1 + 1e-5), 2e-36))
    assert multiples.dtype == jnp.int8 and scale.dtype == jnp.float32


def test_by_hand():
    multiples, scales = quantize(jnp.array([[0.0, 0.0], [-254.0, 127.0], [1e-45, 0.0]]))
    np.testing.assert_array_equal(multiples, [[0, 0], [-127, 64], [0, 0]])  # 63.5 goes to the even number
    np.testing.assert_array_equal(scales, [1, 2, 1])


def test_tokens_are_read_as_they_were_written(getkey):
    args = cache_arguments(SPECS["ragged_gqa4_16_float32"], getkey)
    cache = filled(args.k, args.v)
    expected = dequantize(*quantize(args.k), jnp.float32), dequantize(*quantize(args.v), jnp.float32)
    for one, other in zip(cache.as_read(args.k, args.v), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(cache.keys(LAYER), expected[0])
    np.testing.assert_array_equal(cache.values(LAYER), expected[1])
    slots = jnp.array([[[1, 3]], [[0, 39]], [[7, 99]]]).repeat(3, axis=1)  # one past the end reads another slot
    for ours, theirs in (
        (cache.block(LAYER, 4, 8), tuple(x[:, :, 4:12] for x in expected)),
        (cache.gather(LAYER, slots), tuple(jnp.take_along_axis(x, slots[..., None], 2, mode="clip") for x in expected)),
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_append_and_write_change_their_slots_alone(getkey):
    args = cache_arguments(SPECS["ragged_gqa4_16_float32"], getkey)
    cache = filled(args.k, args.v)
    k, v = (3 * jax.random.normal(getkey(), (3, 3, 5, 16)) for _ in "kv")
    before, new = rounded(cache), cache.as_read(k, v)
    written = rounded(cache.write(LAYER, 6, k, v))
    expected = before.write(LAYER, 6, *new)
    jax.tree.map(np.testing.assert_array_equal, written, expected)
    slots = jnp.array([0, 39, 40])  # the last row writes nothing
    appended = rounded(cache.append(LAYER, slots, k[:, :, 0], v[:, :, 0]))
    expected = before.append(LAYER, slots, *(x[:, :, 0] for x in new))
    jax.tree.map(np.testing.assert_array_equal, appended, expected)
    assert not np.array_equal(appended.k, before.k)


def test_empty_caches_and_buffers():
    cache = Int8HeadMajor.empty(layers=2, batch=1, kv_heads=2, capacity=4, head_dim=8, dtype=jnp.bfloat16)
    assert cache.shape == (2, 1, 2, 4, 8) and cache.dtype == jnp.bfloat16
    assert cache.keys(1).dtype == jnp.bfloat16 and not np.any(np.asarray(cache.values(1), np.float32))
    buffer = cache.empty_like(capacity=3)
    assert isinstance(buffer, HeadMajor) and buffer.shape == (2, 1, 2, 3, 8) and buffer.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("ragged_gqa2_64_float32", "blocks"),
        ("ragged_gqa4_16_float32", "blocks"),
        ("ragged_gqa4_16_float32", "whole"),
        ("ragged_gqa4_64_bfloat16", "blocks"),
    ],
)
def test_operations_give_what_they_give_of_the_rounded_tokens(name, way, getkey, monkeypatch):
    spec = SPECS[name]
    # Blocks of a CPU, with a rest; or a layer at once, as elsewhere.
    monkeypatch.setattr(cache_products, "BLOCK_BYTES", 7 * spec.batch * spec.kv_heads * spec.head_dim * 4)
    monkeypatch.setattr(cache_products, "platform", lambda: {"blocks": "cpu", "whole": "gpu"}[way])
    args = cache_arguments(spec, getkey)
    clean = rounded(filled(args.k, args.v))
    budget = 4
    positions = jnp.minimum(jnp.array([3, -1, 0, 2]), spec.tokens - 1)
    positions = jnp.broadcast_to(positions, (spec.batch, spec.kv_heads, budget))
    chunk = jax.random.normal(getkey(), (spec.batch, spec.kv_heads * spec.group, 1, spec.head_dim))
    start = jnp.maximum(args.lengths - 1, 0)

    def results(cache, read, implementation):
        run = {"layer": LAYER, "implementation": implementation}
        into = cache.empty_like(capacity=budget)
        compact = ops.gather_selection(cache, positions, into, **run)
        out, scores = ops.decode_attention(read, cache, args.lengths, return_scores=True, group_reduction="none", **run)
        return (
            out,
            scores,
            ops.token_scores(read, cache, args.lengths, **run),
            ops.gather_attention(read, cache, positions, **run),
            ops.selection_attention(read, compact, positions >= 0, **run),
            ops.prefill_attention(chunk.astype(read.dtype), cache, start, **run),
            compact.keys(LAYER),
            compact.values(LAYER),
        )

    # As an attended selection too, which no method of ours has.
    poisoned = filled(args.k_poisoned, args.v_poisoned)
    visible = jnp.arange(spec.tokens)[None, None, :] < args.lengths[:, None, None]
    ours = jax.jit(functools.partial(results, implementation="xla"))(poisoned, args.q)
    ours += (ops.selection_attention(args.q, poisoned, visible, layer=LAYER, implementation="xla"),)
    wide = args.q.astype(jnp.float32)
    expected = results(clean, wide, "reference")
    expected += (expected[0],)
    in_use = np.array(spec.lengths) > 0
    for number, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        if number == 5:  # a chunk ends in a slot in use
            mine, theirs = mine[in_use], theirs[in_use]
        if number in (3, 4, 6, 7):  # these may name slots that are not in use
            enough = np.array(spec.lengths) >= 4
            mine, theirs = mine[enough], theirs[enough]
        assert_close(mine.astype(jnp.float32), theirs, 1e-5 if spec.dtype == "float32" else 2e-2)


def test_no_kernel_takes_it(getkey):
    args = cache_arguments(SPECS["full_mha_64_float32"], getkey)
    cache = filled(args.k, args.v)
    with interpreted(), pytest.raises(NotImplementedError, match="needs a TokenMajor cache, got Int8HeadMajor"):
        ops.decode_attention(args.q, cache, args.lengths, layer=LAYER, implementation="pallas_tpu")


def test_arrays_that_do_not_fit_are_named(getkey):
    args = cache_arguments(SPECS["full_mha_64_float32"], getkey)
    cache = filled(args.k, args.v)
    broken = Int8HeadMajor(cache.k, cache.k_scales, cache.v, cache.v_scales.astype(jnp.bfloat16), cache.read_as)
    with pytest.raises(
        ValueError, match=r"cache has k, v and their scales of .* bfloat16\[3, 2, 2, 24\]; expected int8"
    ):
        ops.decode_attention(args.q, broken, args.lengths, layer=LAYER)


def test_compiled_memory_is_half_of_bfloat16s():
    """Arguments are what the cache takes; temporaries would show a layer dequantized (keys: 8 MiB) or copied (4)."""
    sizes = {"layers": 3, "batch": 1, "kv_heads": 4, "capacity": 8192, "head_dim": 128, "dtype": jnp.bfloat16}
    caches = {"int8": Int8HeadMajor.empty(**sizes), "bfloat16": ops.empty_cache("head_major", **sizes)}
    memory = {}
    for name, cache in caches.items():
        leaves, tree = jax.tree.flatten(cache)

        def step(leaves, q, lengths, tree=tree):
            cache = jax.tree.unflatten(tree, leaves)
            k = v = q[:, ::2].astype(jnp.bfloat16)
            cache = cache.append(1, lengths - 1, k, v)
            return jax.tree.leaves(cache), ops.decode_attention(q, cache, lengths, layer=1, implementation="xla")

        q, lengths = jnp.ones((1, 8, 128), jnp.bfloat16), jnp.full(1, 8000)
        compiled = jax.jit(step, donate_argnums=0).lower(leaves, q, lengths).compile()
        memory[name] = compiled.memory_analysis()
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(caches["int8"]))
    assert memory["int8"].argument_size_in_bytes <= 0.55 * memory["bfloat16"].argument_size_in_bytes
    assert memory["int8"].alias_size_in_bytes >= state
    logits = 8 * 8192 * 4
    assert memory["int8"].temp_size_in_bytes <= 6 * logits + 2 * cache_products.BLOCK_BYTES < 4 << 20
