"""TokenSelect against its oracle, and where it coincides with simpler rules."""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from recycled_jax.policies.token_select import SoftVote, token_select
from tests.recycled_jax.policies.numpy_llama import NumpyLlama, NumpyPolicy, best
from tests.recycled_jax.policies.record import (
    ALL_SHARE,
    ONE_TO_ONE,
    assert_equals_oracle,
    assert_rows_alone,
    dense_tokens,
    run,
)
from tests.recycled_jax.policies.token_select_numpy import NumpyTokenSelect
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

NEW = 14
# one row fills the chunks, so that all batches have one shape
ROWS = st.lists(st.integers(1, 32), min_size=3, max_size=3).map(lambda lengths: prompts(32, *lengths))
REGIONS: dict[str, Any] = {"sinks": 3, "recent": 5}
CHECKED = REGIONS | {"threshold": 0.1, "max_stride": 4, "pool": 3}


@pytest.mark.parametrize("config", [ONE_TO_ONE, ALL_SHARE], ids=["group 1", "group 4"])
@settings(max_examples=3, deadline=None, derandomize=True)
@given(rows=ROWS, k=st.sampled_from([12, 20]))
def test_equals_the_oracle(config, rows, k):
    assert_equals_oracle(token_select(k, **CHECKED), lambda: NumpyTokenSelect(k=k, **CHECKED), rows, NEW, config)


def test_compact_positions_equal_the_oracle():
    # From one distance, equal tokens get equal votes in the lowest layer, where rounding would decide; here none do.
    config = dataclasses.replace(CONFIG, vocab=400)
    tokens = np.random.default_rng(0).permutation(config.vocab).tolist()
    rows = [tokens[:32], tokens[32:39], tokens[39:60], tokens[60:61]]
    knobs: dict[str, Any] = {"k": 12, **CHECKED, "vote_scale": 0.5, "positions": "compact"}
    assert_equals_oracle(token_select(**knobs), lambda: NumpyTokenSelect(**knobs), rows, 8, config)


def test_selections_are_kept_while_the_query_stays_close():
    rows = prompts(32, 7, 21, 1)
    generation, _ = run(token_select(12, **CHECKED), rows, NEW, ALL_SHARE)
    retrieved = generation.telemetry.refreshed
    _, params = tiny_model(ALL_SHARE)
    for row, prompt in enumerate(rows):
        oracle = NumpyTokenSelect(k=12, **CHECKED)
        NumpyLlama(ALL_SHARE, params, oracle).generate(prompt, NEW)
        for layer in range(CONFIG.layers):
            assert (np.flatnonzero(retrieved[:, layer, row]) + 1).tolist() == oracle.retrievals[layer]
    similarity = generation.telemetry.similarity[retrieved]
    # some because the query turned away, some because the time was up
    assert (similarity < 0.1).any() and (similarity >= 0.1).any() and not retrieved.all()


def test_a_threshold_above_one_selects_at_every_step():
    knobs: dict[str, Any] = {"k": 12, **REGIONS, "threshold": 1.01}
    rows = prompts(32, 7, 21, 1)
    policy = token_select(**knobs, max_stride=4)
    assert run(policy, rows, NEW)[0].telemetry.refreshed.all()
    assert_equals_oracle(policy, lambda: NumpyTokenSelect(**knobs, max_stride=1), rows, NEW)


class _TopKOfTheMiddle(NumpyPolicy):
    """Exact top-k of a single head, between 3 sinks and 5 recent slots."""

    def __init__(self):
        self.selected = {}

    def attention(self, layer, step):
        middle = range(3, layer.length - 5)
        logits = layer.logits(layer.q[-1][0], 0, middle)
        kept = {
            *range(3),
            *range(layer.length - 5, layer.length),
            *(middle[place] for place in best(list(logits), 12 - 8)),
        }
        slots = sorted(slot for slot in kept if 0 <= slot < layer.length)
        self.selected.setdefault(layer.number, []).append([slots])
        return layer.attend(layer.q[-1], [slots])


def test_one_head_is_exact_top_k_of_the_middle():
    config = dataclasses.replace(CONFIG, query_heads=1, kv_heads=1)
    assert_equals_oracle(
        token_select(k=12, **REGIONS, max_stride=1), _TopKOfTheMiddle, prompts(32, 7, 21, 1), NEW, config
    )


def test_votes_add_up_to_the_heads_and_do_not_depend_on_their_order():
    rng = np.random.default_rng(0)
    batch, kv_heads, group, capacity, head_dim = 3, 2, 3, 24, 8
    keys = rng.normal(size=(batch, kv_heads, capacity, head_dim)).astype(np.float32)
    q = rng.normal(size=(batch, kv_heads, group, head_dim)).astype(np.float32)
    lengths = jnp.array([24, 9, 8])
    vote = SoftVote(**REGIONS, scale=0.7)
    votes = vote.count(jnp.asarray(q.reshape(batch, -1, head_dim)), jnp.asarray(keys), lengths)
    np.testing.assert_allclose(jnp.sum(votes, axis=(1, 2)), [kv_heads * group, kv_heads * group, 0], rtol=1e-6)
    assert not votes[0, 0, :3].any() and not votes[0, 0, -5:].any()
    turned = q[:, ::-1, [2, 0, 1]].reshape(batch, -1, head_dim)
    again = vote.count(jnp.asarray(turned), jnp.asarray(keys[:, ::-1]), lengths)
    np.testing.assert_allclose(votes, again, atol=1e-6)
    assert not np.allclose(votes, vote.count(jnp.asarray(turned), jnp.asarray(keys), lengths), atol=1e-3)


@pytest.mark.parametrize("positions", ["true", "compact"])
def test_a_budget_above_the_length_is_full_attention(positions):
    rows = prompts(32, 7, 21, 1)
    policy = token_select(k=48, **REGIONS, threshold=0.1, max_stride=4, positions=positions)
    assert run(policy, rows, NEW)[0].tokens == dense_tokens(rows, NEW)


def test_a_row_of_a_batch_is_the_row_alone():
    policy, rows = token_select(k=12, **CHECKED), prompts(32, 7, 21, 1)
    assert_rows_alone(policy, rows, NEW, (0, 2), ALL_SHARE)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 700, "recent": 600}, r"recent=600 must be between 1 and k - sinks = 572"),
        ({"max_stride": 0}, r"max_stride=0 must be at least 1"),
        ({"vote_scale": 0.0}, r"vote_scale=0.0 must be above 0"),
        ({"pool": 2}, r"pool=2 must be odd"),
    ],
    ids=str,
)
def test_knobs_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        token_select(**knobs)
