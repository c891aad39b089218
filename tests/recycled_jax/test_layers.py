"""Layers that stand apart: the same numbers as a stack gives, whatever is decoded from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PerLayer, dispatch
from recycled_jax import layers, products
from recycled_jax.generate import generate, read, start
from recycled_jax.policies import make_policy
from recycled_jax.sampling import Sampling
from recycled_jax.scoring import score_tokens
from tests.recycled_jax.random_model import tiny_model

STACKED, APART = 256, 384  # slots
PROMPTS = [list(range(1, 40)), [5, 3, 8, 1], list(range(20, 3, -1))]
POLICIES = {
    "full": {},
    "recycled": {"k": 8, "stride": 3},
    "tidal": {"k": 8, "dense_layers": (0,), "selection_layers": (1,), "correct_every": 4},
    "quest": {"k": 12, "page": 4},
    "h2o": {"k": 8},
}


@pytest.fixture
def apart(monkeypatch):
    """Everything is large enough to be taken apart, once it is called; programs know that by another capacity."""

    def begin():
        monkeypatch.setattr(dispatch, "APART_BYTES", 0)
        monkeypatch.setattr(layers, "APART_BYTES", 0)
        monkeypatch.setattr(products, "LARGE", 0)

    return begin


@pytest.mark.parametrize("name", POLICIES)
def test_generates_what_a_stack_does(name, apart):
    model, params = tiny_model()
    policy = make_policy(name, **POLICIES[name])

    def run(capacity):
        options = {"policy": policy, "max_new_tokens": 12, "capacity": capacity, "chunk": 16, "block": 4}
        return generate(model, params, PROMPTS, **options)

    expected = run(STACKED)
    apart()
    done = run(APART)
    assert done.tokens == expected.tokens
    for ours, theirs in zip(done.log_probs, expected.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_array_equal(done.telemetry.refreshed, expected.telemetry.refreshed)


def test_a_small_buffer_stays_a_stack_beside_layers_apart(monkeypatch):
    model, params = tiny_model()
    policy = make_policy("recycled", k=8, stride=3)
    options = {"policy": policy, "max_new_tokens": 8, "chunk": 16, "block": 4}
    expected = generate(model, params, PROMPTS, capacity=STACKED, **options)
    monkeypatch.setattr(dispatch, "APART_BYTES", 50_000)  # between that of the buffer and that of the cache
    done = generate(model, params, PROMPTS, capacity=APART + 128, **options)
    assert done.tokens == expected.tokens


def test_scores_and_single_rows_are_those_of_a_stack(apart):
    model, params = tiny_model()
    policy = make_policy("recycled", k=8, stride=3)
    follows = jnp.array([[4, 9, 2, 7, 7]])

    def run(of, capacity):
        prefilled = read(model, of, PROMPTS[:1], policies=[policy], max_new_tokens=8, capacity=capacity, chunk=16)
        return score_tokens(model, of, prefilled, follows, policy=policy)

    expected = run(params, STACKED)
    apart()
    ours = run(layers.for_decoding(params), APART)  # prefill too goes through weights that stand apart
    np.testing.assert_allclose(ours.log_probs, expected.log_probs, atol=2e-5)
    np.testing.assert_array_equal(ours.trace.refreshed, expected.trace.refreshed)


def test_what_decodes_is_taken_apart_once(apart):
    model, params = tiny_model()
    policy = make_policy("recycled", k=8, stride=3)
    assert layers.for_decoding(params) is params  # small
    apart()
    weights = layers.for_decoding(params)
    assert isinstance(weights["params"]["layers"], tuple)
    assert layers.for_decoding(weights) is weights
    prefilled = read(model, params, PROMPTS, policies=[policy], max_new_tokens=8, capacity=APART, chunk=16)
    options = {"policy": policy, "sampling": Sampling(), "implementation": None}
    state, _ = start(model, prefilled.cache, prefilled.prompts, jax.random.key(0), **options)
    assert isinstance(state.decode.cache, PerLayer)
    assert isinstance(state.decode.kept.selection.compact, PerLayer)


def test_a_stack_is_scanned():
    """One program for all layers, however many there are."""
    _, params = tiny_model()
    seen = []

    def step(carry, layer):
        seen.append(layer)
        return carry + 1, carry

    jax.eval_shape(lambda: layers.through(step, jnp.int32(0), range(3), params["params"]["layers"]))
    assert len(seen) == 1
    apart = tuple({"w": jnp.zeros(2)} for _ in range(3))
    jax.eval_shape(lambda: layers.through(step, jnp.int32(0), range(3), apart))
    assert seen[1:] == [0, 1, 2]
