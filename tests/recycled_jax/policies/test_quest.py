"""Quest against its oracle, exact top-k and full attention; its bounds."""

import hypothesis.strategies as st
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels import page_bounds
from recycled_jax.frame import Here, LayerPlan, Selecting, Token
from recycled_jax.policies.quest import quest
from tests.recycled_jax.policies.quest_numpy import NumpyQuest
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, dense_tokens, run, run_on
from tests.recycled_jax.policies.top_k_numpy import NumpyTopK
from tests.recycled_jax.random_model import prompts

GROUPS = pytest.mark.parametrize("config", [ONE_TO_ONE, ALL_SHARE], ids=["group 1", "group 4"])
LENGTHS = st.lists(st.integers(1, 32), min_size=3, max_size=3)
NEW = 10
RAGGED = prompts(33, 2, 18)

EVERYWHERE = ()  # no dense layers


@GROUPS
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    lengths=LENGTHS,
    knobs=st.sampled_from(
        [
            {"k": 17, "page": 4, "dense_layers": (0,)},
            {"k": 9, "page": 3, "dense_layers": EVERYWHERE, "group_reduction": "max"},
        ]
    ),
)
def test_equals_the_oracle(config, lengths, knobs):
    assert_equals_oracle(quest(**knobs), lambda: NumpyQuest(**knobs), prompts(*lengths), NEW, config)


def test_pages_of_one_slot_are_exact_top_k():
    # of one query head: logits and probabilities then stand in one order
    policy = quest(6, page=1, dense_layers=EVERYWHERE)
    assert_equals_oracle(policy, lambda: NumpyTopK(k=6), RAGGED, NEW, ONE_TO_ONE)


def test_bounds_after_decoding_are_those_of_the_whole_cache_and_bound_it():
    page = 4
    policy = quest(12, page, "max", dense_layers=EVERYWHERE)
    assert isinstance(policy.method, Selecting)
    state, _ = run_on(policy, RAGGED, prompts(7, 7, 7), ALL_SHARE)
    cache = state.cache
    assert cache is not None
    afresh = cache.empty_like(capacity=state.kept.capacity)
    for layer in range(ALL_SHARE.layers):
        afresh = page_bounds(cache, state.lengths, afresh, layer=layer, page_size=page)
    q = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4, 8)), jnp.float32)
    token = Token(q, q, q[:, :1], q[:, :1])
    for layer in range(ALL_SHARE.layers):
        for row, length in enumerate(np.asarray(state.lengths)):
            in_use = slice(0, -(-length // page))
            for extreme in ("keys", "values"):
                ours, wanted = (getattr(bounds, extreme)(layer)[row, :, in_use] for bounds in (state.kept, afresh))
                np.testing.assert_array_equal(ours, wanted)
        here = Here(jnp.int32(layer), state.lengths, jnp.int32(8), jnp.ones(3, bool), implementation="xla")
        bounds = np.asarray(policy.method.scorer.score(token, cache, state.kept, here))
        logits = np.asarray(jnp.einsum("bhd,btd->bht", q, cache.keys(layer)[:, 0])).max(axis=1) / np.sqrt(8)
        for row, length in enumerate(np.asarray(state.lengths)):
            for slot in range(length):
                assert bounds[row, 0, slot // page] >= logits[row, slot] - 1e-5


def test_a_budget_above_the_length_is_full_attention_and_a_small_one_is_not():
    dense = dense_tokens(RAGGED, NEW, ALL_SHARE)
    assert run(quest(64, dense_layers=EVERYWHERE), RAGGED, NEW, ALL_SHARE)[0].tokens == dense
    assert run(quest(9, 3, "max", dense_layers=EVERYWHERE), RAGGED, NEW, ALL_SHARE)[0].tokens != dense


def test_a_row_of_a_batch_is_the_row_without_padding():
    together, selections = run(quest(9, 3, "max", dense_layers=EVERYWHERE), RAGGED, NEW, ALL_SHARE)
    alone, selections_alone = run(quest(9, 3, "max", dense_layers=EVERYWHERE), RAGGED[1:2] * 3, NEW, ALL_SHARE)
    assert alone.tokens == together.tokens[1:2] * 3 and selections_alone == selections[1:2] * 3


def test_reads_two_vectors_per_page():
    telemetry = run(quest(17, page=4, dense_layers=(0,)), RAGGED, NEW, ALL_SHARE)[0].telemetry
    np.testing.assert_array_equal(telemetry.scored[0], [[0, 0, 0], [18, 2, 10], [18, 2, 10]])
    np.testing.assert_array_equal(telemetry.attended[0], [[34, 3, 19], [14, 3, 15], [14, 3, 15]])


def test_the_papers_two_dense_layers_are_the_default():
    assert quest().method.plan == LayerPlan(dense=(0, 1))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 47}, "k=47 is below 3 pages of 16 slots"),
        ({"page": 0}, "page=0 must be at least 1 slot"),
        ({"group_reduction": "median"}, "group_reduction='median' must be one of max, mean, sum"),
    ],
    ids=str,
)
def test_refuses(knobs, message, monkeypatch):
    # a user has no annotation checks that would come first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        quest(**knobs)


def test_refuses_dense_layers_that_the_model_has_not():
    with pytest.raises(ValueError, match="layer 7 is in the layer plan, the model has layers 0 to 2"):
        run(quest(48, dense_layers=(7,)), RAGGED, NEW)
