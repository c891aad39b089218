"""LessIsMore against its plain-numpy oracle, and where it is another method."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax.frame import AttentionScorer
from recycled_jax.policies import make_policy
from recycled_jax.policies.less_is_more import less_is_more, recent_window
from tests.recycled_jax.policies.less_is_more_numpy import NumpyLessIsMore
from tests.recycled_jax.policies.record import assert_equals_oracle, run
from tests.recycled_jax.random_model import CONFIG, prompts

ALONE = dataclasses.replace(CONFIG, layers=4, kv_heads=4)  # every query head has its own keys
GROUPED = dataclasses.replace(CONFIG, layers=4, kv_heads=1)
ONE_HEAD = dataclasses.replace(CONFIG, query_heads=1, kv_heads=1)
TWO = {"dense_layers": (), "selection_layers": (0, 2)}
ONE = {"dense_layers": (0,), "selection_layers": (1,)}
ALL = {"dense_layers": (), "selection_layers": (0, 1, 2), "attends": "selection"}
RAGGED = prompts(29, 5, 40)
NEW = 12

# The longest row fixes the shape that prompts are padded to, so that a new example is not a new program.
lengths = st.tuples(st.integers(1, 40), st.integers(1, 16), st.integers(33, 48))


@pytest.mark.parametrize(
    ("config", "knobs"),
    [(ALONE, {"k": 24, **TWO}), (GROUPED, {"k": 16, "sinks": 0, **ONE})],
    ids=["group of one", "group of four"],
)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=lengths)
def test_equals_taking_turns_and_dropping_duplicates(config, knobs, lengths):
    rows = prompts(*lengths, seed=sum(lengths))
    assert_equals_oracle(less_is_more(**knobs), lambda: NumpyLessIsMore(**knobs), rows, NEW, config)


def test_one_selection_serves_all_heads_and_the_layers_above():
    _, selections = run(less_is_more(k=24, **TWO), RAGGED, NEW, ALONE)
    for row in (selections[0], selections[2]):  # those with more than k tokens
        assert all(len(heads) == 1 for step in row.values() for heads in step)
        assert row[1] == row[0] and row[3] == row[2] and row[2] != row[0]


def test_with_one_head_it_is_tidal_decode_with_sinks_and_a_recent_window():
    union = less_is_more(k=16, recent_ratio=0.5, **ALL)
    assert (union.method.selector.sinks, union.method.selector.recent) == (4, 4)
    tidal = dataclasses.replace(
        union.method, scorer=AttentionScorer(), selector=dataclasses.replace(union.method.selector, shared=None)
    )
    result, selections = run(union, RAGGED, NEW, ONE_HEAD)
    other, other_selections = run(dataclasses.replace(union, method=tidal), RAGGED, NEW, ONE_HEAD)
    assert result.tokens == other.tokens and selections == other_selections


def test_with_a_recent_ratio_of_one_it_is_streaming_llm_where_it_does_not_select():
    _, selections = run(less_is_more(k=10, recent_ratio=1.0, sinks=3, **ONE), RAGGED, NEW)
    for prompt, row in zip(RAGGED, selections, strict=True):
        for step, heads in enumerate(row[2], start=1):
            length = len(prompt) + step
            expected = sorted({*range(min(3, length)), *range(max(0, length - 7), length)})
            assert heads == [expected]


def test_a_budget_above_the_length_is_full_attention():
    result, _ = run(less_is_more(k=64, **ALL), RAGGED, NEW)
    dense, _ = run(make_policy("full"), RAGGED, NEW)
    assert result.tokens == dense.tokens
    for ours, theirs in zip(result.log_probs, dense.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_padded_row_is_the_row_alone():
    policy = less_is_more(k=10, recent_ratio=1.0, sinks=3, **ONE)
    together, selections = run(policy, RAGGED, NEW)
    for row, prompt in enumerate(RAGGED[:2]):
        alone, alone_selections = run(policy, [prompt], NEW, chunk=32)
        assert together.tokens[row] == alone.tokens[0] and selections[row] == alone_selections[0]


def test_the_recent_window_is_its_share_less_the_sinks():
    assert recent_window(2048, 0.25, 4) == 508
    assert recent_window(12, 0.25, 4) == 1  # the present token has its place
    with pytest.raises(ValueError, match=r"recent_ratio=1.5 must be between 0 and 1"):
        less_is_more(recent_ratio=1.5)
    with pytest.raises(ValueError, match="sinks=4 must be between 0 and k - 1 = 3"):
        less_is_more(k=4)
    with pytest.raises(ValueError, match="layer 1 is among the dense layers and among the selection layers"):
        less_is_more(selection_layers=(1, 7))
