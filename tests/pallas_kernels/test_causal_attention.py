"""causal_attention's kernel in the interpreter, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_attention
from pallas_kernels.ops.causal_attention import pallas_tpu
from tests.pallas_kernels.arg_specs import TOLERANCE, assert_close, jitted, masked, normal


def out_and_gradients(q, k, v, seed, *, implementation):
    out, pullback = jax.vjp(functools.partial(causal_attention, implementation=implementation), q, k, v)
    return out, *pullback(seed)


# (batch, kv_heads, group, head_dim, dtype, tokens), in blocks of 128.
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 2, 64, "float32", 200),  # two blocks, with padding at the end
        (2, 2, 2, 128, "bfloat16", 128),  # one block; every row and every kv head is another
    ],
    ids=str,
)
def test_output_and_gradients_match_oracle(shape, getkey, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "BLOCK", 128)
    batch, kv_heads, group, head_dim, dtype, tokens = shape
    q = 2 * normal(getkey(), (batch, kv_heads * group, tokens, head_dim), dtype)
    k, v = (normal(getkey(), (batch, kv_heads, tokens, head_dim), dtype) for _ in range(2))
    seed = normal(getkey(), q.shape, dtype)  # a cotangent that differs in every entry
    actual = jitted(out_and_gradients, implementation="pallas_tpu")(q, k, v, seed)
    expected = jitted(out_and_gradients, implementation="reference")(q, k, v, seed)
    for name, a, e in zip(("out", "q", "k", "v"), actual, expected, strict=True):
        # Gradients are sums over up to `tokens` terms: their tolerance is relative to the largest entry.
        largest = max(1.0, float(jnp.max(jnp.abs(e)))) if name != "out" else 1.0
        assert_close(a, e, TOLERANCE[dtype] * largest)


def test_the_future_does_not_matter(getkey):
    """Not even NaN keys: what makes trailing padding harmless without lengths."""
    q, k, v = (normal(getkey(), (1, 1, 140, 64), "float32") for _ in range(3))
    known = (np.arange(140) < 90)[:, None]
    attend = jitted(causal_attention, implementation="pallas_tpu")
    out = attend(q, masked(known, k, np.nan), masked(known, v, 1e30))
    np.testing.assert_array_equal(out[:, :, :90], attend(q, k, v)[:, :, :90])


@pytest.mark.parametrize("tokens", [1, 128, 129, 512, 513, 640, 4095, 4096, 5000, 8192])
def test_blocks_cover_the_tokens_with_less_than_128_of_padding_each(tokens):
    block, padded = pallas_tpu.blocks_of(tokens)
    blocks = padded // block
    assert block % 128 == 0
    assert blocks * block == padded >= tokens
    assert padded - tokens < 128 * blocks
    assert block <= (1024 if tokens >= 4096 else 512)


def test_a_mask_that_is_off_by_one_is_caught(getkey, monkeypatch):
    """Shown to a token that should not see it, its successor changes the output and every gradient."""
    q, k, v, seed = (normal(getkey(), (1, 1, 128, 64), "float32") for _ in range(4))
    expected = jitted(out_and_gradients, implementation="reference")(q, k, v, seed)
    causal = pallas_tpu.masks.CausalMask
    monkeypatch.setattr(pallas_tpu.masks, "CausalMask", lambda shape: causal(shape, offset=1))
    # Another function object, so that it is traced anew.
    broken = jitted(lambda *args, **options: out_and_gradients(*args, **options), implementation="pallas_tpu")
    actual = broken(q, k, v, seed)
    for a, e in zip(actual, expected, strict=True):
        assert float(jnp.max(jnp.abs(a - e))) > 0.1
