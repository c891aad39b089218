"""StreamingLLM against its plain-numpy oracle: which slots, and where their keys stand."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax.decode import begin, decode_step
from recycled_jax.generate import read
from recycled_jax.policies.streaming import shift, streaming
from tests.recycled_jax.policies.numpy_llama import Full, NumpyLlama, rotate
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, run
from tests.recycled_jax.policies.streaming_numpy import NumpyStreaming
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

RAGGED = prompts(33, 5, 17)
NEW = 12
# the longest row is given, so that all batches have one shape
LENGTHS = st.tuples(st.just(33), st.integers(1, 33), st.integers(1, 33))


@pytest.mark.parametrize(
    ("config", "sinks", "positions", "budgets"),
    [
        (ONE_TO_ONE, 3, "shifted", [4, 11]),
        (ALL_SHARE, 1, "shifted", [11]),
        (ONE_TO_ONE, 3, "true", [11]),
        (ALL_SHARE, 1, "true", [4]),
    ],
    ids=["group 1, shifted", "group 4, shifted", "group 1", "group 4"],
)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=LENGTHS, data=st.data())
def test_equals_the_oracle(config, sinks, positions, budgets, lengths, data):
    k = data.draw(st.sampled_from(budgets))
    knobs = {"sinks": sinks, "positions": positions}
    assert_equals_oracle(streaming(k, **knobs), lambda: NumpyStreaming(k=k, **knobs), prompts(*lengths), NEW, config)


def test_without_sinks_it_is_a_sliding_window():
    _, slots = run(streaming(8, sinks=0, positions="shifted"), RAGGED, NEW)
    for row, prompt in enumerate(RAGGED):
        for steps in slots[row].values():
            for length, heads in enumerate(steps, len(prompt) + 1):
                assert heads == [list(range(max(0, length - 8), length))] * CONFIG.kv_heads


def test_shifting_starts_when_the_budget_is_exceeded():
    k, prompt = 11, 5
    true, shifted = (
        run(streaming(k, 3, positions), RAGGED, NEW, ONE_TO_ONE)[0].log_probs for positions in ("true", "shifted")
    )
    assert len(RAGGED[1]) == prompt
    equal = k - prompt + 1  # the first comes from the prompt
    np.testing.assert_allclose(shifted[1][:equal], true[1][:equal], atol=1e-5)
    assert abs(shifted[1][equal] - true[1][equal]) > 1e-3 and abs(shifted[0][1] - true[0][1]) > 1e-3


def test_shifted_keys_by_rotating_them_afresh():
    config = dataclasses.replace(CONFIG, rope_theta=500.0)
    bare = np.random.default_rng(3).normal(size=(2, 2, 3, config.head_dim))

    def turned(by):
        rows = [[rotate(config, row[:, t], t + by[b]) for t in range(3)] for b, row in enumerate(bare)]
        return np.swapaxes(np.array(rows), 1, 2)

    moved = shift(config, jnp.asarray(turned([0, 0]), jnp.float32), jnp.array([7, 50]))
    np.testing.assert_allclose(moved, turned([7, 50]), atol=1e-5)


def test_a_budget_above_the_length_is_full_attention():
    ours, _ = run(streaming(64, positions="shifted"), RAGGED, NEW)
    _, params = tiny_model()
    assert ours.tokens == [NumpyLlama(CONFIG, params, Full()).generate(prompt, NEW) for prompt in RAGGED]
    np.testing.assert_array_equal(ours.telemetry.kv_bytes_per_token(), ours.telemetry.dense_kv_bytes_per_token())


def test_a_padded_row_is_the_row_alone_and_the_full_cache_is_not_needed():
    together, slots = run(streaming(11, 3, "shifted"), RAGGED, NEW, ONE_TO_ONE)
    for row, prompt in enumerate(RAGGED):
        alone, own = run(streaming(11, 3, "shifted", keep_cache=False), [prompt], NEW, ONE_TO_ONE, chunk=48)
        assert own[0] == slots[row] and alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-5)


@pytest.mark.parametrize("positions", ["true", "shifted"])
def test_without_the_full_cache_the_state_does_not_grow_with_the_capacity(positions):
    model, params = tiny_model()

    def size(capacity: int, **knobs) -> int:
        policy = streaming(8, positions=positions, **knobs)

        def leaves():
            prefilled = read(model, params, RAGGED, policies=[policy], max_new_tokens=NEW, capacity=capacity, chunk=16)
            return jax.tree.leaves(begin(policy, prefilled))

        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.eval_shape(leaves))

    assert size(128, keep_cache=False) == size(512, keep_cache=False) < size(128) < size(512)


def test_rows_that_have_stopped_keep_what_they_hold():
    model, params = tiny_model()
    policy = streaming(8, 3, "shifted")
    prefilled = read(model, params, RAGGED, policies=[policy], max_new_tokens=2, chunk=16)

    @jax.jit
    def step(params, prefilled, token, active):
        before = begin(policy, prefilled)
        return before.kept, decode_step(model, params, before, token, policy=policy, active=active)[1].kept

    before, after = step(params, prefilled, jnp.arange(3), jnp.array([False, False, True]))
    for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(was[:, :2], now[:, :2])
    was, now = before.recycling.selection, after.recycling.selection
    assert (was.positions[:, 2:] != now.positions[:, 2:]).any() and (was.compact.k[:, 2:] != now.compact.k[:, 2:]).any()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 4}, "sinks=4 must be between 0 and k - 1 = 3"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"sinks": -1}, "sinks=-1 must be between 0 and"),
        ({"positions": "cache"}, "positions='cache' must be one of true, shifted"),
    ],
    ids=str,
)
def test_bad_knobs_are_refused(knobs, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        streaming(**knobs)
