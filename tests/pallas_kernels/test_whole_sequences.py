"""causal_attention and prefill_attention: many queries at once."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_attention, from_heads, interpreted, prefill_attention
from pallas_kernels.ops.causal_attention.api import IMPLEMENTATIONS as CAUSAL
from pallas_kernels.ops.prefill_attention.xla import BLOCK_KV
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

# (kv_heads, group, head_dim, dtype, tokens): one chunk, several with a ragged last one, a single token.
SEQUENCES = (
    (2, 1, 64, "float32", 40),
    (1, 4, 16, "float32", 300),
    (2, 2, 16, "bfloat16", 257),
    (1, 2, 16, "float32", 1),
)


def random_sequence(kv_heads, group, head_dim, dtype, tokens, getkey):
    q = 2 * normal(getkey(), (2, kv_heads * group, tokens, head_dim), dtype)
    k, v = (normal(getkey(), (2, kv_heads, tokens, head_dim), dtype) for _ in range(2))
    return q, k, v


def out_and_gradients(q, k, v, seed, *, implementation):
    out, pullback = jax.vjp(functools.partial(causal_attention, implementation=implementation), q, k, v)
    return out, *pullback(seed)


@pytest.mark.parametrize("shape", SEQUENCES, ids=str)
@pytest.mark.parametrize("implementation", sorted(set(CAUSAL) - {"reference"}))
def test_causal_attention_and_its_gradients_match_oracle(implementation, shape, getkey):
    q, k, v = random_sequence(*shape, getkey)
    seed = normal(getkey(), q.shape, q.dtype)  # a cotangent that differs in every entry

    actual = jitted(out_and_gradients, implementation=implementation)(q, k, v, seed)
    expected = jitted(out_and_gradients, implementation="reference")(q, k, v, seed)
    for name, a, e in zip(("out", "q", "k", "v"), actual, expected, strict=True):
        # Gradients are sums over up to `tokens` terms: their tolerance is relative to the largest entry.
        largest = max(1.0, float(jnp.max(jnp.abs(e)))) if name != "out" else 1.0
        assert_close(a, e, TOLERANCE[shape[3]] * largest)


@pytest.mark.parametrize("implementation", sorted(CAUSAL))
def test_causal_attention_worked_by_hand(implementation):
    # head_dim 1, scale 1, q = 1, weights 1, 2, 5: each token averages over itself and what came before.
    q = jnp.ones((1, 1, 3, 1))
    k = jnp.log(jnp.array([[[[1.0], [2.0], [5.0]]]]))
    v = jnp.array([[[[3.0], [6.0], [8.0]]]])
    out = jitted(causal_attention, scale=1.0, implementation=implementation)(q, k, v)
    np.testing.assert_allclose(out[0, 0, :, 0], [3, (3 + 2 * 6) / 3, (3 + 2 * 6 + 5 * 8) / 8], rtol=1e-6)


@pytest.mark.parametrize("implementation", sorted(CAUSAL))
def test_the_future_does_not_matter(implementation, getkey):
    """Not even NaN keys: what makes trailing padding harmless without lengths."""
    q, k, v = random_sequence(1, 2, 16, "float32", 200, getkey)
    known = (np.arange(200) < 140)[:, None]
    attend = jitted(causal_attention, implementation=implementation)
    out = attend(q, masked(known, k, np.nan), masked(known, v, 1e30))
    np.testing.assert_array_equal(out[:, :, :140], attend(q, k, v)[:, :, :140])


# Three blocks of the XLA loop, the last one overlapping the second.
CACHE_TOKENS = 2 * BLOCK_KV + 76


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_prefill_attention_matches_oracle_for_every_start(implementation, layout, dtype, getkey):
    chunk, head_dim = 50, 16
    q = 2 * normal(getkey(), (2, 4, chunk, head_dim), dtype)
    k, v = (normal(getkey(), (2, 2, CACHE_TOKENS, head_dim), dtype) for _ in range(2))
    oracle = jitted(prefill_attention, implementation="reference")
    attend = jitted(prefill_attention, implementation=implementation)
    # At the front, ending on a block border, across a border, inside the last block, at the very end.
    for start in (0, BLOCK_KV - chunk, BLOCK_KV - 20, 2 * BLOCK_KV + 5, CACHE_TOKENS - chunk):
        written = (np.arange(CACHE_TOKENS) < start + chunk)[:, None]
        k_poisoned, v_poisoned = masked(written, k, np.nan), masked(written, v, 1e30)
        actual = attend(q, stacked(layout, k_poisoned, v_poisoned), jnp.int32(start), layer=LAYER)
        expected = oracle(q, stacked("head_major", k, v), jnp.int32(start), layer=LAYER)
        assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_prefill_attention_in_pieces_equals_causal_attention(implementation, layout, getkey):
    q, k, v = random_sequence(2, 2, 16, "float32", 90, getkey)
    whole = jitted(causal_attention, implementation="reference")(q, k, v)
    # The start is a Python number here, and traced in the test above.
    cache = from_heads(layout, k, v)
    attend = functools.partial(prefill_attention, implementation=implementation)
    with interpreted() if implementation == "pallas_tpu" else contextlib.nullcontext():
        pieces = [attend(q[:, :, start : start + 30], cache, start) for start in (0, 30, 60)]
    assert_close(jnp.concatenate(pieces, axis=2), whole, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("layout", ["head_major", "token_major"])
def test_prefill_attention_with_a_start_for_each_row(implementation, layout, getkey):
    q = normal(getkey(), (3, 4, 20, 16), "float32")
    k, v = (normal(getkey(), (3, 2, CACHE_TOKENS, 16), "float32") for _ in range(2))
    attend = jitted(prefill_attention, implementation=implementation)
    starts = (0, CACHE_TOKENS - 20, BLOCK_KV - 7)
    together = attend(q, from_heads(layout, k, v), jnp.array(starts))
    for row, start in enumerate(starts):
        alone = attend(q[row : row + 1], from_heads(layout, k[row : row + 1], v[row : row + 1]), jnp.int32(start))
        assert_close(together[row : row + 1], alone, TOLERANCE["float32"])


def test_prefill_attention_reads_no_block_beyond_its_chunk(getkey):
    """A NaN value spoils what multiplies it, if only by zero: these are in the first block not needed."""
    q = normal(getkey(), (1, 2, 50, 16), "float32")
    k, v = (normal(getkey(), (1, 1, CACHE_TOKENS, 16), "float32") for _ in range(2))
    attend = jitted(prefill_attention, implementation="xla")
    needed = (np.arange(CACHE_TOKENS) < BLOCK_KV)[:, None]
    for start, is_read in ((BLOCK_KV - 50, False), (BLOCK_KV - 49, True)):
        out = attend(q, from_heads("head_major", k, masked(needed, v, np.nan)), jnp.int32(start))
        assert bool(jnp.isnan(out).any()) == is_read
