"""Squeezed Attention against its oracle; its estimates and thresholds."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from pallas_kernels import decode_attention, token_scores
from recycled_jax.config import LlamaConfig
from recycled_jax.frame import Here, Token
from recycled_jax.generate import read
from recycled_jax.policies.kmeans import draws
from recycled_jax.policies.squeezed import Level, Squeezed, Thresholds, pooled_quantile, squeezed
from tests.recycled_jax.policies.numpy_llama import NumpyLlama
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, dense_tokens, run
from tests.recycled_jax.policies.squeezed_numpy import NumpySqueezed
from tests.recycled_jax.random_model import prompts, tiny_model

NEW = 10
RAGGED = prompts(60, 5, 33)
ONE_LEVEL = {"k": 24, "cluster_size": 3, "quantile": 0.8, "window": 6}
TWO_LEVELS = {"k": 40, "cluster_size": 2, "quantile": 0.8, "window": 6, "coarse_size": 10, "coarse_quantile": 0.5}
RANDOM = np.asarray(draws(0, 128)).tolist()


def oracle(knobs):
    return NumpySqueezed(draws=lambda count: RANDOM[:count], **knobs)


def decided(numpy_policy, row, config) -> bool:
    """Whether float32 clusters the keys as float64 does: no key is midway between two centroids."""
    NumpyLlama(config, tiny_model(config)[1], numpy_policy).generate(row, 2)
    return numpy_policy.margin > 1e-5


@pytest.mark.parametrize(
    ("config", "knobs"), [(ONE_TO_ONE, TWO_LEVELS), (ALL_SHARE, ONE_LEVEL)], ids=["group 1", "group 4"]
)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=st.tuples(st.integers(49, 64), st.integers(1, 64), st.integers(1, 64)))
def test_equals_the_oracle(config, knobs, lengths):
    rows = prompts(*lengths)
    assume(all(decided(oracle(knobs), row, config) for row in rows))
    assert_equals_oracle(squeezed(**knobs), lambda: oracle(knobs), rows, NEW, config)


def test_prompts_within_the_window_get_full_attention_and_others_do_not():
    rows = [RAGGED[0], *prompts(6, 3)]
    got = run(squeezed(**ONE_LEVEL), rows, NEW, ALL_SHARE)[0].tokens
    dense = dense_tokens(rows, NEW, ALL_SHARE)
    assert got[1:] == dense[1:] and got[0] != dense[0]


def test_a_row_of_a_batch_is_the_row_without_padding():
    together, selections = run(squeezed(**ONE_LEVEL), RAGGED, NEW, ALL_SHARE)
    alone, selections_alone = run(squeezed(**ONE_LEVEL), RAGGED[2:] * 3, NEW, ALL_SHARE)
    assert alone.tokens == together.tokens[2:] * 3 and selections_alone == selections[2:] * 3


def begun(config: LlamaConfig, **knobs):
    """Policy, cache and state after the prompts of `RAGGED`."""
    policy = squeezed(**knobs)
    assert isinstance(policy.method, Squeezed)
    model, params = tiny_model(config)
    prefilled = read(model, params, RAGGED, policies=[policy], max_new_tokens=NEW, chunk=16)
    return policy.method, prefilled.cache, _begin(policy.method, prefilled)


@functools.partial(jax.jit, static_argnums=0)
def _begin(method, prefilled):
    return method.begin(prefilled, implementation=None)


@functools.partial(jax.jit, static_argnums=0)
def attend(method, cache, state, active):
    """One layer's attention of a random token."""
    rng = np.random.default_rng(5)
    q = jnp.asarray(1.5 * rng.normal(size=(3, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(3, cache.kv_heads, 8)), jnp.float32) for _ in range(2))
    before = jnp.array([len(row) for row in RAGGED])
    cache = cache.append(1, before, k, v)
    here = Here(jnp.array(1), before + 1, jnp.array(1), active)
    attended = method.attend("select", Token(q, q, k, v), cache, state, (), here)
    return attended.positions, attended.output, attended.state, decode_attention(q, cache, before + 1, layer=1)


def with_thresholds(state, value: float):
    return dataclasses.replace(state, thresholds=Thresholds(jnp.full(3, value), jnp.full(3, value)))


def test_thresholds_from_below_zero_upwards():
    method, cache, state = begun(ALL_SHARE, **TWO_LEVELS | {"k": 128})
    everyone = jnp.ones(3, bool)
    kept = []
    for threshold in (-1.0, 0.001, 0.01, 0.1, 1.0):
        positions, output, _, dense = attend(method, cache, with_thresholds(state, threshold), everyone)
        kept.append([set(slots[slots >= 0].tolist()) for slots in np.asarray(positions[:, 0])])
        if threshold < 0:
            np.testing.assert_allclose(output, dense, atol=1e-5)
    for row, prompt in enumerate(RAGGED):
        lower, higher = kept[:-1], kept[1:]
        assert all(more[row] >= fewer[row] for more, fewer in zip(lower, higher, strict=True))
        assert kept[0][row] == set(range(len(prompt) + 1))
        # the observation window and self are above any threshold
        assert kept[-1][row] == set(range(max(0, len(prompt) - method.window), len(prompt) + 1))
    assert len({len(slots[0]) for slots in kept}) > 2


def test_the_cap_is_counted_in_active_rows():
    method, cache, state = begun(ALL_SHARE, **TWO_LEVELS | {"k": 20})
    active = jnp.array([True, True, False])
    positions, _, after, _ = attend(method, cache, with_thresholds(state, -1.0), active)
    # without a threshold everything is wanted: 61, 6 and 34 slots
    assert np.sum(np.asarray(positions) >= 0, axis=-1).tolist() == [[20], [6], [20]]
    assert after.overflow.tolist() == [[0, 0, 0], [41, 0, 0], [0, 0, 0]]
    for row, newest in ((0, range(54, 61)), (2, range(27, 34))):
        assert set(newest) <= set(positions[row, 0].tolist())


def test_a_cluster_for_every_slot_estimates_the_exact_attention():
    _, cache, state = begun(ONE_TO_ONE, **ONE_LEVEL | {"cluster_size": 1})
    q = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 8)), jnp.float32)
    level = jax.tree.map(lambda x: x[2], state.fine)
    labels = np.asarray(state.labels[2])
    shares = np.take_along_axis(np.asarray(level.shares(q[:, :, None], None)), np.maximum(labels, 0), axis=-1)
    exact = token_scores(q, cache, state.clustered, layer=2)
    clustered = labels >= 0
    assert clustered.sum(axis=-1).tolist() == [[54] * 4, [0] * 4, [27] * 4]
    np.testing.assert_allclose(shares[clustered], np.asarray(exact)[clustered], rtol=1e-4, atol=1e-7)


def test_shares_of_all_slots_sum_to_one():
    rng = np.random.default_rng(3)
    centroids = jnp.asarray(3 * rng.normal(size=(2, 4, 7, 8)), jnp.float32)
    counts = jnp.asarray(rng.integers(0, 5, size=(2, 4, 7)))
    level, q = Level(centroids, counts), jnp.asarray(rng.normal(size=(2, 4, 3, 8)), jnp.float32)
    np.testing.assert_allclose(jnp.sum(counts * level.shares(q, None), axis=-1), 1, rtol=1e-5)
    kept = jnp.arange(7)[None, None, :] % 2 == jnp.arange(2)[:, None, None]
    kept = jnp.broadcast_to(kept, counts.shape)
    partly = level.shares(q, kept)
    np.testing.assert_allclose(jnp.sum(counts * partly, axis=-1), 1, rtol=1e-5)
    assert not np.any(np.asarray(partly)[~np.asarray(kept)])
    # the largest of a group is at least every one of it, so that their sum is above 1
    shared = Level(centroids[:, :1], counts[:, :1]).shares(q, None)
    assert np.all(jnp.sum(counts[:, :1] * shared, axis=-1) > 1 + 1e-3)


def test_a_share_by_hand():
    # a query of 2 and centroids of log 3 and 0, head_dim 4: exp(log 3) = 3 for each of two slots, 1 for one: 3/7, 1/7
    centroids = jnp.zeros((1, 1, 3, 4)).at[0, 0, 0, 0].set(np.log(3.0))
    level = Level(centroids, jnp.array([[[2, 1, 0]]]))
    shares = level.shares(jnp.full((1, 1, 1, 4), 2.0), None)
    np.testing.assert_allclose(shares, [[[3 / 7, 1 / 7, 0]]], rtol=1e-6)
    assert level.passing(shares, jnp.array([0.2])).tolist() == [[[True, False, False]]]
    only_one = Level(centroids, jnp.array([[[2, 0, 0]]]))
    assert only_one.passing(only_one.shares(jnp.ones((1, 1, 1, 4)), None), jnp.array([0.5]))[0, 0, 0]


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 1.0])
def test_pooled_quantile_is_that_of_all_slots(quantile):
    rng = np.random.default_rng(4)
    shares = rng.random(size=(3, 2, 4, 6)).astype(np.float32)
    counts = rng.integers(0, 5, size=shares.shape)
    got = pooled_quantile(jnp.asarray(shares), jnp.asarray(counts), quantile)
    for row in range(2):
        slots = np.repeat(shares[:, row].ravel(), counts[:, row].ravel())
        np.testing.assert_allclose(got[row], np.quantile(slots, quantile), rtol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 100}, "k=100 must be above window=100"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"quantile": 1.5}, "quantile=1.5 must be between 0 and 1"),
        ({"coarse_quantile": -0.5}, "coarse_quantile=-0.5 must be between 0 and 1"),
        ({"cluster_size": 0}, "cluster_size=0 must be at least 1 slot"),
        ({"coarse_size": 20}, "coarse_size=20 must be above cluster_size=20"),
        ({"iterations": -1}, "iterations=-1 must be at least 0"),
    ],
    ids=str,
)
def test_refuses(knobs, message):
    with pytest.raises(ValueError, match=message):
        squeezed(**knobs)
