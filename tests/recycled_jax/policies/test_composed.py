"""Composed policies: the same as the named ones where they coincide, and errors for what makes no sense."""

import numpy as np
import pytest

from recycled_jax.generate import generate
from recycled_jax.policies import Policy, make_policy
from recycled_jax.policies.composed import composed
from recycled_jax.policies.quest import quest
from recycled_jax.policies.random_slots import random_slots
from recycled_jax.policies.tidal import tidal
from tests.recycled_jax.random_model import prompts, tiny_model

RAGGED = prompts(29, 5, 40, 1)
TOP_8 = {"name": "top-k", "k": 8}


def run(policy: Policy, rows=RAGGED):
    model, params = tiny_model()
    return generate(model, params, rows, policy=policy, max_new_tokens=16, chunk=16, block=8)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (
            {"selector": {**TOP_8, "pool": 7}, "schedule": {"name": "fixed", "stride": 4}, "refresh": "full"},
            make_policy("recycled", k=8, stride=4),
        ),
        (
            {"selector": {**TOP_8, "sinks": 4}, "scorer": {"name": "recency"}, "schedule": {"name": "never"}},
            make_policy("streaming", k=8),
        ),
        (
            {
                "scorer": {"name": "page-bounds", "page": 4},
                "selector": {"name": "top-pages", "k": 12, "page": 4},
                "schedule": {"name": "every-step"},
                "layers": {"dense": [0, 1]},
            },
            quest(k=12, page=4),
        ),
        (
            {
                "selector": TOP_8,
                "schedule": {"name": "every-step"},
                "layers": {"dense": [0], "select": [1]},
                "refresh": "full",
            },
            tidal(k=8, dense_layers=(0,), selection_layers=(1,)),
        ),
        (
            {"scorer": {"name": "random", "seed": 3}, "selector": TOP_8, "schedule": {"name": "every-step"}},
            random_slots(k=8, seed=3),
        ),
    ],
    ids=["recycled", "streaming", "quest", "tidal", "random"],
)
def test_equals_the_named_policy(parts, named):
    ours, theirs = run(composed(**parts)), run(named)
    assert ours.tokens == theirs.tokens and ours.log_probs == theirs.log_probs


@pytest.mark.parametrize(
    "parts",
    [
        {"scorer": {"name": "page-bounds", "page": 4}, "selector": {**TOP_8, "k": 64}},
        {"scorer": {"name": "int8"}, "selector": {**TOP_8, "k": 64}, "schedule": {"name": "fixed", "stride": 3}},
        {"selector": {"name": "top-pages", "k": 64, "page": 4}, "schedule": {"name": "every-step"}},
        {
            "selector": {**TOP_8, "k": 64},
            "schedule": {"name": "query-check", "stride": 2, "threshold": 0.6},
            "layers": {"dense": [1], "select": [0]},
        },
    ],
    ids=str,
)
def test_a_budget_above_the_length_is_full_attention(parts):
    ours, dense = run(composed(**parts)), run(make_policy("full"))
    assert ours.tokens == dense.tokens
    for row, other in zip(ours.log_probs, dense.log_probs, strict=True):
        np.testing.assert_allclose(row, other, atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [
        {"scorer": {"name": "page-bounds", "page": 4}, "selector": {**TOP_8, "k": 16, "sinks": 2}},
        {"selector": {"name": "top-pages", "k": 12, "page": 4}, "schedule": {"name": "every-step"}},
        {"scorer": {"name": "int8"}, "selector": {**TOP_8, "k": 16}, "schedule": {"name": "fixed", "stride": 3}},
    ],
    ids=str,
)
def test_a_padded_row_is_the_row_alone(parts):
    policy = composed(**parts)
    together = run(policy)
    for row in (0, 3):
        alone = run(policy, [RAGGED[row]])
        assert together.tokens[row] == alone.tokens[0]


def test_scores_of_slots_rank_pages_by_their_best_slot():
    # a page of one slot is a slot
    pages = {"selector": {"name": "top-pages", "k": 8, "page": 1}, "schedule": {"name": "every-step"}}
    slots = {"selector": TOP_8, "schedule": {"name": "every-step"}}
    assert run(composed(**pages)).tokens == run(composed(**slots)).tokens


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"scorer": {"name": "atention"}}, "policy.scorer.name='atention' is unknown; did you mean 'attention'"),
        ({"scorer": {}}, "policy.scorer is {}; expected a name among attention, "),
        ({"selector": {"name": "top-k"}}, "policy.selector.k is missing; 'top-k' has no default for it"),
        ({"selector": {**TOP_8, "pol": 7}}, "policy.selector.pol is not a field of 'top-k'; did you mean 'pool'"),
        (
            {"schedule": {"name": "never", "stride": 3}},
            "policy.schedule.stride is not a field of 'never'; it has no fields",
        ),
        ({"selector": {**TOP_8, "pool": 2}}, "pool=2 must be odd"),
        ({"layers": {"dnse": [0]}}, "policy.layers.dnse is not known; did you mean 'dense'"),
        (
            {"selector": {"name": "top-pages", "k": 32, "page": 16}, "schedule": {"name": "fixed", "stride": 3}},
            "'top-pages' gives no order of eviction",
        ),
        ({"scorer": {"name": "query-heads"}, "selector": TOP_8}, "scores every query head; set policy.selector.shared"),
        (
            {"selector": {**TOP_8, "tail": 3}, "schedule": {"name": "every-step"}},
            "policy.selector.tail=3 has no use where every step selects",
        ),
        (
            {
                "scorer": {"name": "page-bounds", "page": 8},
                "selector": {"name": "top-pages", "k": 32, "page": 16},
                "schedule": {"name": "every-step"},
            },
            "policy.scorer.page=8 and policy.selector.page=16 differ",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_sense(parts, said):
    with pytest.raises(ValueError, match=said):
        composed(**parts)
