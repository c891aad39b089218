"""decode_attention and token_scores: one query step over the full, ragged cache."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_attention, decode_attention, from_heads, token_scores
from tests.pallas_kernels.arg_specs import (
    ARG_SPECS,
    IMPLEMENTATIONS_AND_LAYOUTS,
    LAYER,
    assert_close,
    cache_arguments,
    jitted,
    normal,
)

by_name = functools.partial(pytest.mark.parametrize, ids=lambda spec: spec.name)


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_decode_attention_matches_oracle(implementation, layout, spec, getkey):
    args = cache_arguments(spec, getkey)
    oracle = jitted(decode_attention, return_scores=True, implementation="reference")
    expected = oracle(args.q, args.cache(), args.lengths, layer=LAYER)
    attend = jitted(decode_attention, return_scores=True, implementation=implementation)
    out, scores = attend(args.q, args.poisoned(layout), args.lengths, layer=LAYER)
    assert_close(out, expected[0], spec.tolerance)
    assert_close(scores, expected[1], spec.tolerance)
    assert scores.dtype == jnp.float32
    empty = np.asarray(args.lengths) == 0
    assert not np.asarray(out, np.float32)[empty].any()
    assert not np.asarray(scores)[empty].any()


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_token_scores_match_oracle(implementation, layout, spec, getkey):
    args = cache_arguments(spec, getkey)
    oracle = jitted(token_scores, group_reduction="mean", implementation="reference")
    expected = oracle(args.q, args.cache(), args.lengths, layer=LAYER)
    score = jitted(token_scores, group_reduction="mean", implementation=implementation)
    assert_close(score(args.q, args.poisoned(layout), args.lengths, layer=LAYER), expected, spec.tolerance)


# One kv head with two query heads, head_dim 1, scale 1, three slots in use out of four.
#   query head 0: q = 1, logits 0, ln 2, ln 5: weights 1, 2, 5 of 8; out = (1*8 + 2*16 + 5*0) / 8 = 5
#   query head 1: q = 0, logits 0,    0,    0: weights 1, 1, 1 of 3; out = (8 + 16 + 0) / 3 = 8
HAND_Q = [[[1.0], [0.0]]]
HAND_K = [[[[0.0], [np.log(2)], [np.log(5)], [np.nan]]]]
HAND_V = [[[[8.0], [16.0], [0.0], [1e30]]]]
HAND_SCORES = {
    "none": [[1 / 8, 2 / 8, 5 / 8, 0], [1 / 3, 1 / 3, 1 / 3, 0]],
    "max": [1 / 3, 1 / 3, 5 / 8, 0],
    "mean": [11 / 48, 14 / 48, 23 / 48, 0],  # (1/8 + 1/3) / 2 and so on
    "sum": [11 / 24, 14 / 24, 23 / 24, 0],
}


@pytest.mark.parametrize("group_reduction", sorted(HAND_SCORES))
@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_worked_by_hand(implementation, layout, group_reduction):
    q, lengths = jnp.array(HAND_Q), jnp.array([3])
    cache = from_heads(layout, jnp.array(HAND_K), jnp.array(HAND_V))
    options = {"scale": 1.0, "group_reduction": group_reduction, "implementation": implementation}
    out, scores = jitted(decode_attention, return_scores=True, **options)(q, cache, lengths)
    np.testing.assert_allclose(out[0, :, 0], [5, 8], rtol=1e-6)
    np.testing.assert_allclose(scores[0], np.atleast_2d(HAND_SCORES[group_reduction]), rtol=1e-6)
    np.testing.assert_allclose(jitted(token_scores, **options)(q, cache, lengths), scores, rtol=1e-6)


@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_scale_is_one_over_root_head_dim(implementation, layout):
    # head_dim 4 and q.k = 2 ln 3 or 0: with 1/sqrt(4) the weights are 3 and 1, so out = (3*4 + 1*0) / 4 = 3.
    q = jnp.full((1, 1, 4), np.log(3) / 2, jnp.float32)
    k = jnp.array([[[[1.0] * 4, [0.0] * 4]]])
    v = jnp.array([[[[4.0] * 4, [0.0] * 4]]])
    out = jitted(decode_attention, implementation=implementation)(q, from_heads(layout, k, v), jnp.array([2]))
    np.testing.assert_allclose(out, np.full((1, 1, 4), 3.0), rtol=1e-6)


@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_large_logits_do_not_overflow(implementation, layout):
    # exp(1000) is inf in float32; both weights shifted by the largest logit are 1.
    q, k, v = jnp.full((1, 1, 1), 1000.0), jnp.ones((1, 1, 2, 1)), jnp.array([[[[1.0], [3.0]]]])
    out = jitted(decode_attention, implementation=implementation)(q, from_heads(layout, k, v), jnp.array([2]))
    np.testing.assert_allclose(out, [[[2.0]]], rtol=1e-6)


@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_query_may_be_wider_than_the_cache(implementation, layout, getkey):
    """A float32 query over a bfloat16 cache gives a float32 result, and the cache is not widened for it."""
    q = normal(getkey(), (2, 4, 16), "float32")
    k, v = (normal(getkey(), (2, 2, 9, 16), "bfloat16") for _ in range(2))
    lengths = jnp.array([9, 4])
    expected = decode_attention(q, from_heads("head_major", k, v), lengths, implementation="reference")
    actual = jitted(decode_attention, implementation=implementation)(q, from_heads(layout, k, v), lengths)
    assert_close(actual, expected, 2e-2)


@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_equals_last_row_of_causal_attention(implementation, layout, getkey):
    q = normal(getkey(), (2, 4, 300, 16), "float32")
    k, v = (normal(getkey(), (2, 2, 300, 16), "float32") for _ in range(2))
    whole = jitted(causal_attention, implementation="reference")(q, k, v)
    attend = jitted(decode_attention, implementation=implementation)
    for length in (300, 129, 1):
        last = attend(q[:, :, length - 1], from_heads(layout, k, v), jnp.array([length, length]))
        assert_close(last, whole[:, :, length - 1], 3e-6)
