"""Scores from int8 keys: close to the exact ones, kept up to date, never of the attention itself."""

import jax.numpy as jnp
import numpy as np

from recycled_jax.frame import AttentionScorer, Here, Token
from recycled_jax.generate import generate, read
from recycled_jax.policies.composed import composed
from recycled_jax.policies.int8_keys import Int8Scorer, QuantizedKeys, quantize
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

RAGGED = prompts(29, 5, 40)


def test_a_key_is_off_by_half_a_step_of_its_scale_at_most():
    keys = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 8)) * 10.0 ** np.arange(-2, 3)[None, :, None])
    keys = keys.at[1, 2].set(0.0)
    multiples, scales = quantize(keys)
    assert multiples.dtype == jnp.int8 and (np.abs(multiples).max(axis=-1) == 127).sum() == 14
    error = np.abs(np.asarray(keys) - np.asarray(multiples, np.float32) * np.asarray(scales)[..., None])
    assert (error <= 0.5001 * np.asarray(scales)[..., None]).all()
    np.testing.assert_allclose(np.asarray(scales)[0], np.abs(keys[0]).max(axis=-1) / 127, rtol=1e-6)


def test_scores_are_close_to_the_exact_ones():
    model, params = tiny_model()
    prefilled = read(model, params, RAGGED, max_new_tokens=8, chunk=16)
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(3, CONFIG.query_heads, CONFIG.head_dim)), jnp.float32)
    k = jnp.zeros((3, CONFIG.kv_heads, CONFIG.head_dim))
    lengths = prefilled.prompts.lengths
    here = Here(jnp.int32(1), lengths, jnp.int32(1), jnp.ones(3, bool))
    scorer = Int8Scorer("mean")
    state = scorer.begin(prefilled, implementation=None)
    scores = scorer.score(Token(q, q, k, k), prefilled.cache, state, here)
    exact = AttentionScorer("mean").score(Token(q, q, k, k), prefilled.cache, (), here)
    np.testing.assert_allclose(scores, exact, atol=0.02)
    assert np.abs(np.asarray(scores) - np.asarray(exact)).max() > 0  # they are not the exact keys


def test_the_copy_follows_the_cache():
    model, params = tiny_model()
    policy = composed({"name": "int8"}, {"name": "top-k", "k": 8}, {"name": "fixed", "stride": 3})
    prefilled = read(model, params, RAGGED, max_new_tokens=8, chunk=16)
    cache, scorer = prefilled.cache, Int8Scorer()
    state = scorer.begin(prefilled, implementation=None)
    token = jnp.asarray(np.random.default_rng(2).normal(size=(3, CONFIG.kv_heads, CONFIG.head_dim)), jnp.float32)
    q = jnp.zeros((3, CONFIG.query_heads, CONFIG.head_dim))
    active = jnp.array([True, False, True])
    here = Here(jnp.int32(2), prefilled.prompts.lengths + active, jnp.int32(1), active)
    after = scorer.append(state, Token(q, q, token, token), here)
    slots = jnp.where(active, prefilled.prompts.lengths, cache.capacity)
    expected = quantize(cache.append(2, slots, token, token).keys(2))
    np.testing.assert_array_equal(after.multiples[2], expected[0])
    np.testing.assert_array_equal(after.scales[2], expected[1])
    for layer in (0, 1):
        np.testing.assert_array_equal(after.multiples[layer], state.multiples[layer])
    assert (
        isinstance(after, QuantizedKeys)
        and generate(model, params, RAGGED, policy=policy, max_new_tokens=8, chunk=16).tokens
    )


def test_reads_less_than_the_keys():
    model, params = tiny_model()
    cache = read(model, params, RAGGED, max_new_tokens=8, chunk=16).cache
    lengths = jnp.array([10, 100])
    # float32 keys of 8 channels are 32 bytes; a copy is 8 and a scale of 4
    np.testing.assert_allclose(Int8Scorer().reads(lengths, cache), np.array([10, 100]) * 12 / 32)
