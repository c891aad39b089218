"""Exact top-p against its oracle, and what it promises."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from recycled_jax.frame import TopK
from recycled_jax.policies.top_p import TopP, mass_before, top_p
from tests.recycled_jax.policies.numpy_llama import NumpyLlama
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, dense_tokens, run, run_on
from tests.recycled_jax.policies.top_p_numpy import NumpyTopP
from tests.recycled_jax.random_model import prompts, tiny_model

GROUPS = pytest.mark.parametrize("config", [ONE_TO_ONE, ALL_SHARE], ids=["group 1", "group 4"])
LENGTHS = st.lists(st.integers(1, 32), min_size=3, max_size=3)
NEW = 10
RAGGED = prompts(33, 2, 18)


@GROUPS
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=LENGTHS, knobs=st.sampled_from([{"p": 0.8, "k": 64}, {"p": 0.95, "k": 6}]))
def test_equals_the_oracle(config, lengths, knobs):
    assert_equals_oracle(top_p(**knobs), lambda: NumpyTopP(**knobs), prompts(*lengths), NEW, config)


def test_counts_what_the_cap_leaves_out():
    policy = top_p(0.95, k=6)
    generation, _ = run(policy, RAGGED, NEW, ALL_SHARE)
    state, _ = run_on(policy, RAGGED, [row[:-1] for row in generation.tokens], ALL_SHARE)
    _, params = tiny_model(ALL_SHARE)
    for row, prompt in enumerate(RAGGED):
        oracle = NumpyTopP(p=0.95, k=6)
        NumpyLlama(ALL_SHARE, params, oracle).generate(prompt, NEW)
        assert state.kept.overflow[:, row].tolist() == [oracle.overflow[layer] for layer in range(ALL_SHARE.layers)]
    assert np.asarray(state.kept.overflow).max() > 0


def test_holds_p_of_the_attention_and_not_much_more():
    coverage = run(top_p(0.8, k=64), RAGGED, NEW, ONE_TO_ONE, coverage=True)[0].telemetry.coverage
    assert coverage.min() >= 0.8 - 1e-5
    assert coverage.mean() < 0.97


def test_of_one_head_it_is_top_k_with_its_own_count():
    rows = np.random.default_rng(0).dirichlet(np.full(32, 0.3), size=(4, 2)).astype(np.float32)
    lengths = jnp.full(4, 32)
    nucleus = TopP(0.8, k=32).select(-mass_before(jnp.asarray(rows)), lengths, implementation="xla")
    sets = [set(slots[slots >= 0].tolist()) for slots in np.asarray(nucleus).reshape(8, -1)]
    assert len({len(slots) for slots in sets}) > 2
    for place, slots in enumerate(sets):
        same_count = TopK(len(slots)).select(jnp.asarray(rows), lengths, implementation="xla")
        assert set(np.asarray(same_count).reshape(8, -1)[place].tolist()) == slots


def test_by_hand():
    # sorted 0.5, 0.3, 0.15, 0.05: 0.8 is reached by two of them, and self, the last slot, is added
    row = jnp.array([[[0.15, 0.5, 0.3, 0.05]]])
    np.testing.assert_allclose(mass_before(row), [[[0.8, 0.0, 0.5, 0.95]]], rtol=1e-6)
    selector, lengths = TopP(0.75, k=4), jnp.array([4])
    assert selector.select(-mass_before(row), lengths, implementation="xla").tolist() == [[[-1, 2, 1, 3]]]
    assert selector.left_out(-mass_before(row), lengths).tolist() == [0]
    assert TopP(0.75, k=2).select(-mass_before(row), lengths, implementation="xla").tolist() == [[[1, 3]]]
    assert TopP(0.75, k=2).left_out(-mass_before(row), lengths).tolist() == [1]


def test_all_of_the_attention_is_full_attention_and_a_part_is_not():
    dense = dense_tokens(RAGGED, NEW, ALL_SHARE)
    everything, selections = run(top_p(1.0, k=64), RAGGED, NEW, ALL_SHARE)
    assert everything.tokens == dense
    assert selections[0][0][0] == [list(range(34))]
    assert run(top_p(0.95, k=6), RAGGED, NEW, ALL_SHARE)[0].tokens != dense


def test_a_row_of_a_batch_is_the_row_without_padding():
    together, selections = run(top_p(0.8, k=64), RAGGED, NEW, ALL_SHARE)
    alone, selections_alone = run(top_p(0.8, k=64), RAGGED[1:2] * 3, NEW, ALL_SHARE)
    assert alone.tokens == together.tokens[1:2] * 3 and selections_alone == selections[1:2] * 3


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"p": 0.0}, "p=0.0 must be above 0 and at most 1"),
        ({"p": 1.5}, "p=1.5 must be above 0 and at most 1"),
        ({"k": 0}, "k=0 must be at least 1"),
    ],
    ids=str,
)
def test_refuses(knobs, message):
    with pytest.raises(ValueError, match=message):
        top_p(**knobs)
