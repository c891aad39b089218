"""Exact top-k against its oracle and full attention."""

import hypothesis.strategies as st
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings

from recycled_jax.policies.random_slots import random_slots
from recycled_jax.policies.top_k import top_k
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, dense_tokens, run
from tests.recycled_jax.policies.top_k_numpy import NumpyTopK
from tests.recycled_jax.random_model import prompts

GROUPS = pytest.mark.parametrize("config", [ONE_TO_ONE, ALL_SHARE], ids=["group 1", "group 4"])
LENGTHS = st.lists(st.integers(1, 32), min_size=3, max_size=3)
NEW = 10
RAGGED = prompts(33, 2, 18)


@GROUPS
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=LENGTHS, knobs=st.sampled_from([{"k": 4, "pool": 3}, {"k": 12, "group_reduction": "mean"}]))
def test_equals_the_oracle(config, lengths, knobs):
    assert_equals_oracle(top_k(**knobs), lambda: NumpyTopK(**knobs), prompts(*lengths), NEW, config)


def test_a_budget_above_the_length_is_full_attention_and_a_small_one_is_not():
    dense = dense_tokens(RAGGED, NEW, ALL_SHARE)
    assert run(top_k(64), RAGGED, NEW, ALL_SHARE)[0].tokens == dense
    assert run(top_k(4, pool=3), RAGGED, NEW, ALL_SHARE)[0].tokens != dense


def test_a_row_of_a_batch_is_the_row_without_padding():
    together, selections = run(top_k(4, pool=3), RAGGED, NEW, ALL_SHARE)
    alone, selections_alone = run(top_k(4, pool=3), RAGGED[1:2] * 3, NEW, ALL_SHARE)
    assert alone.tokens == together.tokens[1:2] * 3 and selections_alone == selections[1:2] * 3


def test_no_other_selection_of_k_slots_holds_more():
    # seen in the lowest layer at the first step, where every policy has the same query
    def coverage(policy):
        generation, _ = run(policy, RAGGED, 2, ONE_TO_ONE, coverage=True)
        return generation.telemetry.coverage[0, 0]

    exact, drawn = coverage(top_k(4, pool=1)), coverage(random_slots(4))
    long_rows = [0, 2]
    assert (exact >= drawn - 1e-6).all() and (exact[long_rows] > drawn[long_rows]).all()


def test_reads_all_keys_and_attends_k_slots():
    telemetry = run(top_k(4, pool=3), RAGGED, NEW, ALL_SHARE)[0].telemetry
    assert (telemetry.attended[-1] == 4).all()
    np.testing.assert_array_equal(telemetry.scored[-1], [[len(row) + NEW - 1 for row in RAGGED]] * 3)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"pool": 2}, "pool=2 must be odd"),
        ({"group_reduction": "median"}, "group_reduction='median' must be one of max, mean, sum"),
    ],
    ids=str,
)
def test_refuses(knobs, message, monkeypatch):
    # a user has no annotation checks that would come first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        top_k(**knobs)
