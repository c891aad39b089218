"""The registry, and what the parts of a policy refuse."""

import jax.numpy as jnp
import jaxtyping
import pytest

from recycled_jax.frame import AttentionScorer, FixedStride, QueryCheck, Recycling, TopK
from recycled_jax.policies import POLICIES, make_policy
from recycled_jax.sampling import Sampling


def test_defaults_of_every_policy_are_valid_and_hashable():
    for name in POLICIES:
        policy = make_policy(name)
        assert policy.name == name and hash(policy) == hash(make_policy(name))


def test_recycled_is_the_papers():
    parts = make_policy("recycled", k=4096, stride=15).method
    assert parts == Recycling(AttentionScorer("max"), TopK(4096, pool=7), FixedStride(15), "full")


def test_dynamic_refreshes_at_the_latest_after_k_minus_one_steps():
    assert make_policy("recycled-dynamic", k=64).method.schedule == QueryCheck(5, 0.85, 63, "before_rope")


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("recyled", {}, "policy='recyled' is unknown; did you mean 'recycled'"),
        ("zzz", {}, "policy='zzz' is unknown; expected one of full, recycled, "),
        ("recycled", {"strid": 3}, "policy.strid is not a knob of 'recycled'; did you mean 'stride'"),
        ("full", {"k": 3}, "policy.k is not a knob of 'full'; there is none"),
        ("recycled", {"k": 0}, "k=0 must be at least 1"),
        ("recycled", {"stride": 0}, "stride=0 must be at least 1"),
        ("recycled", {"pool": 4}, "pool=4 must be odd"),
        ("recycled", {"k": 4, "stride": 5}, "stride=5 is above k - sinks = 4"),
        ("recycled-dynamic", {"k": 8, "stride": 2, "max_stride": 9}, "max_stride=9 is above k - sinks = 8"),
        ("recycled-dynamic", {"k": 4}, "stride=5 is above k - sinks = 4"),
        ("recycled", {"refresh": "none"}, "refresh='none' must be one of full, selection"),
        ("recycled-dynamic", {"rows": "most"}, "rows='most' must be one of per_row, any, all"),
        ("recycled-dynamic", {"max_stride": 3}, "max_stride=3 is below stride=5"),
        ("recycled-dynamic", {"query_point": "during"}, "query_point='during' must be 'before_rope' or 'after_rope'"),
        ("recycled", {"group_reduction": "median"}, "group_reduction='median' must be one of max, mean, sum"),
        ("streaming", {"k": 4}, "sinks=4 must be between 0 and k - 1 = 3"),
    ],
    ids=str,
)
def test_bad_values_are_refused_in_one_sentence(name, knobs, message, monkeypatch):
    # a user has no annotation checks that would come first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        make_policy(name, **knobs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
    ],
    ids=str,
)
def test_sampling_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_query_check_by_hand():
    check = QueryCheck(stride=4, threshold=0.8, max_stride=6)
    since, similarity = jnp.array([3, 3, 5]), jnp.array([0.8, 0.81, 1.0])
    assert check.wants(jnp.int32(4), since, similarity).tolist() == [True, False, True]
    assert check.wants(jnp.int32(5), since, similarity).tolist() == [False, False, True]


def test_entries_overwritten_by_new_tokens():
    # 8 entries, 3 of them sinks at the end: the ring has 5
    selector = TopK(8, sinks=3)
    positions, since = jnp.array([1, 2, 3, 40, 40]), jnp.array([0, 1, 2, 4, 5])
    assert selector.entry_for(positions, since).tolist() == [6, 7, 2, 4, 0]
