"""Stale top-k against its oracle, and as what recycling attends so many steps after a refresh."""

import hypothesis.strategies as st
import jaxtyping
import pytest
from hypothesis import given, settings

from recycled_jax.policies.recycled import recycled
from recycled_jax.policies.stale_top_k import stale_top_k
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, dense_tokens, run, run_on
from tests.recycled_jax.policies.stale_top_k_numpy import NumpyStaleTopK
from tests.recycled_jax.policies.top_k_numpy import NumpyTopK
from tests.recycled_jax.random_model import prompts

GROUPS = pytest.mark.parametrize("config", [ONE_TO_ONE, ALL_SHARE], ids=["group 1", "group 4"])
LENGTHS = st.lists(st.integers(1, 32), min_size=3, max_size=3)
NEW = 10
RAGGED = prompts(33, 2, 18)


@GROUPS
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=LENGTHS, knobs=st.sampled_from([{"k": 6, "delay": 2, "pool": 3}, {"k": 12, "delay": 11}]))
def test_equals_the_oracle(config, lengths, knobs):
    assert_equals_oracle(stale_top_k(**knobs), lambda: NumpyStaleTopK(**knobs), prompts(*lengths), NEW, config)


def test_without_delay_it_is_top_k():
    assert_equals_oracle(stale_top_k(6, delay=0), lambda: NumpyTopK(k=6), RAGGED, NEW, ALL_SHARE)


def test_is_what_recycling_attends_so_many_steps_after_a_refresh():
    # in the lowest layer, whose queries depend on the tokens alone
    stride, tokens = 2, prompts(7, 7, 7, seed=2)
    _, recycling = run_on(recycled(6, stride, refresh="selection", pool=3), RAGGED, tokens, ALL_SHARE)
    for delay in range(stride):
        _, stale = run_on(stale_top_k(6, delay, pool=3), RAGGED, tokens, ALL_SHARE)
        for ours, theirs in zip(stale, recycling, strict=True):
            at_that_age = slice((delay - 1) % stride, None, stride)
            assert ours[0][at_that_age] == theirs[0][at_that_age]


def test_a_budget_above_the_length_is_full_attention_and_a_small_one_is_not():
    dense = dense_tokens(RAGGED, NEW, ALL_SHARE)
    assert run(stale_top_k(64, delay=5), RAGGED, NEW, ALL_SHARE)[0].tokens == dense
    assert run(stale_top_k(6, delay=2, pool=3), RAGGED, NEW, ALL_SHARE)[0].tokens != dense


def test_a_row_of_a_batch_is_the_row_without_padding():
    together, selections = run(stale_top_k(6, delay=2, pool=3), RAGGED, NEW, ALL_SHARE)
    alone, selections_alone = run(stale_top_k(6, delay=2, pool=3), RAGGED[1:2] * 3, NEW, ALL_SHARE)
    assert alone.tokens == together.tokens[1:2] * 3 and selections_alone == selections[1:2] * 3


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 4, "delay": 4}, "delay=4 must be between 0 and k - 1 = 3"),
        ({"k": 4, "delay": -1}, "delay=-1 must be between 0 and k - 1 = 3"),
        ({"k": 0, "delay": 0}, "k=0 must be at least 1"),
        ({"pool": 2}, "pool=2 must be odd"),
        ({"group_reduction": "median"}, "group_reduction='median' must be one of max, mean, sum"),
    ],
    ids=str,
)
def test_refuses(knobs, message, monkeypatch):
    # a user has no annotation checks that would come first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        stale_top_k(**knobs)
