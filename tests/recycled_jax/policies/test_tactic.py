"""Tactic against its oracle, exact top-p and full attention; the fitted tail."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from recycled_jax.frame import Here
from recycled_jax.policies.kmeans import draws
from recycled_jax.policies.tactic import FittedTail, capped, tactic
from tests.recycled_jax.policies.numpy_llama import NumpyLlama, best
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, dense_tokens, run, run_on
from tests.recycled_jax.policies.tactic_numpy import NumpyTactic
from tests.recycled_jax.policies.top_p_numpy import NumpyTopP
from tests.recycled_jax.random_model import prompts, tiny_model

NEW = 12
RAGGED = prompts(60, 5, 33)
# the short rows begin with exact attention; all are clustered anew at steps 5 and 10
SMALL = {"p": 0.8, "cluster_size": 4, "recluster": 5, "exact_below": 20}
ONE, ALL = SMALL | {"k": 40}, SMALL | {"k": 24}
RANDOM = np.asarray(draws(0, 128)).tolist()


def starts(length: int, clusters: int) -> list[int]:
    return best(RANDOM[:length], clusters)


def decided(numpy_policy, row, config) -> bool:
    """Whether float32 clusters the keys as float64 does: no key is ever midway between two centroids."""
    NumpyLlama(config, tiny_model(config)[1], numpy_policy).generate(row, NEW)
    return numpy_policy.margin > 1e-5


@pytest.mark.parametrize(("config", "knobs"), [(ONE_TO_ONE, ONE), (ALL_SHARE, ALL)], ids=["group 1", "group 4"])
@settings(max_examples=2, deadline=None, derandomize=True)
@given(lengths=st.tuples(st.integers(49, 64), st.integers(1, 64), st.integers(1, 64)))
def test_equals_the_oracle(config, knobs, lengths):
    rows = prompts(*lengths)
    assume(all(decided(NumpyTactic(starts=starts, **knobs), row, config) for row in rows))
    assert_equals_oracle(tactic(**knobs), lambda: NumpyTactic(starts=starts, **knobs), rows, NEW, config)


def test_counts_what_the_cap_leaves_out():
    tokens = prompts(7, 7, 7)
    state, selections = run_on(tactic(**ALL), RAGGED, tokens, ALL_SHARE)
    _, params = tiny_model(ALL_SHARE)
    for row, prompt in enumerate(RAGGED):
        oracle = NumpyTactic(starts=starts, **ALL)
        llama = NumpyLlama(ALL_SHARE, params, oracle)
        llama.generate(prompt, 1)
        for step, token in enumerate(tokens[row], start=1):
            llama.forward(token, step)
        assert selections[row] == oracle.selected
        assert state.kept.overflow[:, row].tolist() == [oracle.overflow[layer] for layer in range(ALL_SHARE.layers)]
    assert np.asarray(state.kept.overflow).max() > 0


def test_the_cap_keeps_the_strongest_and_ignores_stopped_rows():
    wanted = jnp.array([[[True, True, False, True, True]], [[True, True, False, True, True]]])
    strength = jnp.where(wanted, jnp.array([[[-0.3, -0.1, 0, -0.1, 9.0]]]), -2.0)
    here = Here(jnp.array(0), jnp.array([5, 5]), jnp.array(1), jnp.array([True, False]))
    positions, left_out = capped(strength, wanted, k=2, here=here)
    assert [set(row.tolist()) for row in positions[:, 0]] == [{1, 4}, {1, 4}]
    assert left_out.tolist() == [2, 0]
    positions, left_out = capped(strength, wanted, k=5, here=here)
    assert [set(row.tolist()) for row in positions[:, 0]] == [{0, 1, 3, 4, -1}] * 2
    assert left_out.tolist() == [0, 0]


def test_all_of_the_attention_is_full_attention_and_a_part_is_not():
    dense = dense_tokens(RAGGED, NEW, ALL_SHARE)
    everything, selections = run(tactic(**ALL | {"p": 1.0, "k": 128}), RAGGED, NEW, ALL_SHARE)
    assert everything.tokens == dense
    assert selections[0][2][-1] == [list(range(60 + NEW - 1))]
    assert run(tactic(**ALL), RAGGED, NEW, ALL_SHARE)[0].tokens != dense


def test_exact_weights_of_all_ranks_in_their_order_are_exact_top_p():
    # a cluster for every key, anew at every step, orders the slots by their logits
    knobs = {"p": 0.8, "k": 64, "cluster_size": 1, "exact_one_in": 1, "recluster": 1, "exact_below": 1}
    generation, selections = run(tactic(**knobs), RAGGED, NEW, ALL_SHARE, coverage=True)
    _, params = tiny_model(ALL_SHARE)
    for row, prompt in enumerate(RAGGED):
        oracle = NumpyTopP(p=0.8, k=64)
        assert generation.tokens[row] == NumpyLlama(ALL_SHARE, params, oracle).generate(prompt, NEW)
        assert selections[row] == dict(oracle.selected)
    assert generation.telemetry.coverage.min() >= 0.8 - 1e-5


def test_reads_little_besides_what_it_attends():
    telemetry = run(tactic(**ALL), RAGGED, NEW, ALL_SHARE)[0].telemetry
    scored, lengths = telemetry.scored, np.array([60, 5, 33])[None, :] + np.arange(1, NEW)[:, None]
    # exact below 20 slots; a clustering reads every key in each of 10 updates and before the first
    anew = np.arange(1, NEW) % 5 == 0
    np.testing.assert_array_equal(scored[~anew, :, 1], np.broadcast_to(lengths[~anew, 1:2], (len(scored[~anew]), 3)))
    assert (scored[anew] >= 11 * lengths[anew][:, None, :]).all()
    # at most a centroid for 4 keys, and for each of 4 query heads 2 keys of the first ranks and 1 of each window
    assert (scored[~anew, :, 0] <= lengths[~anew, :1] / 4 + 16).all() and scored.min() > 0


@pytest.mark.parametrize("exact_one_in", [64, 7, 1])
def test_the_tail_is_that_of_the_oracle(exact_one_in):
    capacity, counts = 1024, [1000, 3, 1, 257]
    tail, rng = FittedTail(exact_one_in), np.random.default_rng(0)
    # by rank, falling as sorted logits do but for noise; NaN past the counts
    logits = np.full((4, 2, 3, capacity), np.nan, np.float32)
    for row, count in enumerate(counts):
        noisy = rng.normal(size=(2, 3, count)) - 2 * np.log(np.arange(1, count + 1))
        logits[row, :, :, :count] = noisy

    @jax.jit
    def weights(counts):
        samples, parts = tail.samples(counts, capacity)
        sampled = jnp.take_along_axis(jnp.asarray(logits), samples[:, None, None, :], axis=-1)
        sampled = jnp.where(jnp.any(parts, axis=1)[:, None, None, :], sampled, 0)
        return tail.weights(sampled, samples, parts, counts, capacity), jnp.sum(jnp.any(parts, axis=1), axis=1)

    got, read = weights(jnp.array(counts))
    oracle = NumpyTactic(p=0.9, starts=starts, exact_one_in=exact_one_in)
    for row, count in enumerate(counts):
        for head, member in np.ndindex(2, 3):
            expected = oracle.estimate(logits[row, head, member, :count].astype(np.float64))
            np.testing.assert_allclose(got[row, head, member, :count], expected, rtol=1e-4, atol=1e-7)
            assert not np.any(got[row, head, member, count:])
    if exact_one_in == 64:
        assert read[0] == 26  # of 1000, 2.6 percent: 16 first ranks and two windows of 5


def test_a_tail_by_hand():
    # 10 ranks: the first is exact; the windows are ranks 1 and 6, of weights 1 and 1/6: a = 1, b = 0
    tail, counts = FittedTail(64), jnp.array([10])
    samples, parts = tail.samples(counts, 16)
    assert samples[parts.any(axis=1)].tolist() == [0, 0, 5]
    logits = -jnp.log(samples + 1.0)[:, None, None, :]
    weights = tail.weights(logits, samples, parts, counts, 16)[0, 0, 0]
    np.testing.assert_allclose(weights, [*(1 / np.arange(1, 11)), *[0] * 6], rtol=1e-5)


def test_a_row_of_a_batch_is_the_row_without_padding():
    together, selections = run(tactic(**ALL), RAGGED, NEW, ALL_SHARE)
    alone, selections_alone = run(tactic(**ALL), RAGGED[1:2] * 3, NEW, ALL_SHARE)
    assert alone.tokens == together.tokens[1:2] * 3 and selections_alone == selections[1:2] * 3


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"p": 0.0}, "p=0.0 must be above 0 and at most 1"),
        ({"p": 1.5}, "p=1.5 must be above 0 and at most 1"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"cluster_size": 0}, "cluster_size=0 must be at least 1 key"),
        ({"iterations": -1}, "iterations=-1 must be at least 0"),
        ({"recluster": 0}, "recluster=0 must be at least 1 step"),
        ({"exact_one_in": 0}, "exact_one_in=0 must be at least 1"),
        ({"exact_below": 0}, "exact_below=0 must be at least 1 slot"),
    ],
    ids=str,
)
def test_refuses(knobs, message):
    with pytest.raises(ValueError, match=message):
        tactic(**knobs)
