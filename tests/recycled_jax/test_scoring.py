"""Scoring given text: the model's own probabilities when dense, generation's when the text is what it generated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recycled_jax.generate import generate, read
from recycled_jax.policies import make_policy
from recycled_jax.policies.tidal import tidal
from recycled_jax.scoring import score_tokens
from tests.recycled_jax.random_model import prompts, tiny_model

RAGGED = prompts(29, 5, 40)
NEW = 12


def test_dense_scores_are_the_model_s():
    model, params = tiny_model()
    continuations = np.array(prompts(NEW, NEW, NEW, seed=7))
    prefilled = read(model, params, RAGGED, max_new_tokens=NEW, chunk=16)
    scored = score_tokens(model, params, prefilled, jnp.asarray(continuations), policy=make_policy("full"))
    whole = jax.jit(model.apply)
    for row, (prompt, continuation) in enumerate(zip(RAGGED, continuations, strict=True)):
        text = np.zeros((1, 64), np.int32)
        text[0, : len(prompt) + NEW] = [*prompt, *continuation]
        expected = jax.nn.log_softmax(whole(params, text)[0])[
            np.arange(len(prompt) - 1, len(prompt) + NEW - 1), continuation
        ]
        np.testing.assert_allclose(scored.log_probs[row], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "knobs"), [("recycled", {"k": 8, "stride": 3}), ("streaming", {"k": 8, "sinks": 2})], ids=str
)
def test_text_a_policy_generated_scores_as_it_did_then(name, knobs):
    model, params = tiny_model()
    policy = make_policy(name, **knobs)
    prefilled = read(model, params, RAGGED, max_new_tokens=NEW, chunk=16)
    done = generate(model, params, prefilled, policy=policy, max_new_tokens=NEW)
    scored = score_tokens(model, params, prefilled, jnp.array(done.tokens), policy=policy)
    np.testing.assert_allclose(scored.log_probs, done.log_probs, atol=1e-5)
    np.testing.assert_array_equal(scored.trace.refreshed, done.telemetry.refreshed)
    other = score_tokens(model, params, prefilled, jnp.array(done.tokens), policy=make_policy("full"))
    assert np.abs(np.asarray(other.log_probs) - np.asarray(scored.log_probs)).max() > 0.01


def test_a_policy_that_corrects_the_cache_is_refused():
    model, params = tiny_model()
    prefilled = read(model, params, RAGGED, max_new_tokens=NEW, chunk=16)
    policy = tidal(k=8, dense_layers=(0,), selection_layers=(1,), correct_every=4)
    with pytest.raises(ValueError, match="policy 'tidal' corrects the cache every 4 steps"):
        score_tokens(model, params, prefilled, jnp.zeros((3, 4), jnp.int32), policy=policy)
