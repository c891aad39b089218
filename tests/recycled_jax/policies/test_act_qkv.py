"""ActQKV's decoding part against its oracle; the budgets of its layers."""

import sys
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from recycled_jax.policies.act_qkv import EntropyBudgets, act_qkv, normalized_entropy
from tests.recycled_jax.policies.act_qkv_numpy import NumpyActQKV, layer_budgets, probe_query
from tests.recycled_jax.policies.numpy_llama import NumpyLlama
from tests.recycled_jax.policies.record import (
    ALL_SHARE,
    ONE_TO_ONE,
    assert_equals_oracle,
    assert_rows_alone,
    dense_tokens,
    run,
)
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

NEW = 14
# one row fills the chunks, so that all batches have one shape
ROWS = st.lists(st.integers(1, 32), min_size=3, max_size=3).map(lambda lengths: prompts(32, *lengths))
KNOBS: dict[str, Any] = {"block": 4, "sinks": 3, "recent": 5, "representatives": 2, "samples": 3, "fewest": 1}


@pytest.mark.parametrize("config", [ONE_TO_ONE, ALL_SHARE], ids=["group 1", "group 4"])
@settings(max_examples=3, deadline=None, derandomize=True)
@given(rows=ROWS, k=st.sampled_from([13, 20]))
def test_equals_the_oracle_whose_probe_keeps_statistics(config, rows, k):
    # the oracle's probe query is the paper's, with running mean and variance, over a window of one token
    assert_equals_oracle(act_qkv(k, **KNOBS), lambda: NumpyActQKV(k=k, **KNOBS), rows, NEW, config)


class _SharperEntropies(NumpyActQKV):
    """Entropies to the power of 100: those of cosines are so close to 1 that all budgets would be the mean."""

    def select(self, layer):
        entropies = self.entropies[layer.number]
        before = len(entropies)
        slots = super().select(layer)
        entropies[before:] = [entropy**100 for entropy in entropies[before:]]
        return slots


def test_uneven_budgets_equal_the_oracle(monkeypatch):
    module = sys.modules[act_qkv.__module__]
    monkeypatch.setattr(module, "normalized_entropy", lambda *args: normalized_entropy(*args) ** 100)
    knobs: dict[str, Any] = {"block": 1, "sinks": 1, "recent": 2, "representatives": 1, "samples": 2, "fewest": 3}
    rows = prompts(32, 7, 30, 1)
    assert_equals_oracle(act_qkv(14, **knobs), lambda: _SharperEntropies(k=14, **knobs), rows, NEW)
    oracle = _SharperEntropies(k=14, **knobs)
    NumpyLlama(CONFIG, tiny_model()[1], oracle).generate(rows[0], NEW)
    mean = [oracle.block_budget] * CONFIG.layers
    assert oracle.budgets[:2] == [mean, mean] and all(sum(budgets) == sum(mean) for budgets in oracle.budgets)
    assert any(budgets != mean for budgets in oracle.budgets)


def test_a_probe_over_one_query_is_that_query():
    rng = np.random.default_rng(0)
    q, mean, variance = rng.normal(size=(1, 24)), rng.normal(size=24), rng.uniform(0.5, 2, size=24)
    np.testing.assert_allclose(probe_query(q, mean, variance), q[0])
    pair = np.concatenate([q, rng.normal(size=(1, 24))])
    assert not np.allclose(probe_query(pair, mean, variance), pair.mean(axis=0))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    entropies=st.lists(st.floats(0.0625, 1, width=32), min_size=5, max_size=5),
    mean=st.sampled_from([7, 23, 46]),
    fewest=st.sampled_from([1, 32]),
)
def test_granted_budgets_equal_the_oracle_and_sum_to_the_whole_unless_clipped(entropies, mean, fewest):
    granted = EntropyBudgets(mean, samples=1, fewest=fewest).grant(jnp.array(entropies, jnp.float32)[:, None])
    granted = granted[:, 0].tolist()
    expected = layer_budgets(entropies, mean, fewest)
    # where a share is half a block, float32 may round to the other side
    assert max(abs(a - b) for a, b in zip(granted, expected, strict=True)) <= 1
    clipped = {min(fewest, mean), 2 * mean}
    assert sum(granted) == 5 * mean or clipped & set(granted)


def test_equal_entropies_give_every_layer_the_mean():
    entropies = jnp.array([[0.3, 0.9, 0.0]] * 7)
    assert (EntropyBudgets(46, samples=1, fewest=32).grant(entropies) == 46).all()


def test_entropy_is_a_share_of_the_largest():
    even = normalized_entropy(jnp.array([[0.5, 0.5, 0.5, 9.0]]), jnp.array([[True, True, True, False]]))
    np.testing.assert_allclose(even, 1.0, rtol=1e-6)
    # p = 3/4, 1/4: (0.75 ln(4/3) + 0.25 ln 4) / ln 2
    uneven = normalized_entropy(jnp.log(jnp.array([[3.0, 1.0]])), jnp.array([[True, True]]))
    np.testing.assert_allclose(uneven, (0.75 * np.log(4 / 3) + 0.25 * np.log(4)) / np.log(2), rtol=1e-6)


def test_a_budget_above_the_length_is_full_attention():
    rows = prompts(32, 7, 21, 1)
    assert run(act_qkv(46, **KNOBS), rows, NEW)[0].tokens == dense_tokens(rows, NEW)


def test_a_row_of_a_batch_is_the_row_alone():
    policy, rows = act_qkv(13, **KNOBS), prompts(32, 7, 21, 1)
    assert_rows_alone(policy, rows, NEW, (0, 2), ALL_SHARE)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 600}, r"k=600 leaves no room for a block"),
        ({"samples": 0}, r"samples=0 must be at least 1"),
        ({"fewest": 0}, r"fewest=0 must be at least 1 block"),
        ({"representatives": 0}, r"representatives=0 must be between 1 and block = 32"),
    ],
    ids=str,
)
def test_knobs_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        act_qkv(**knobs)
