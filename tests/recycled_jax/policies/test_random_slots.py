"""Random slots against their oracle, which gets the same numbers; and how random they are."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels import empty_cache
from recycled_jax.frame import Here, Selecting, Token
from recycled_jax.policies.random_slots import random_slots
from tests.recycled_jax.policies.random_slots_numpy import NumpyRandomSlots
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, dense_tokens, run
from tests.recycled_jax.random_model import prompts

GROUPS = pytest.mark.parametrize("config", [ONE_TO_ONE, ALL_SHARE], ids=["group 1", "group 4"])
LENGTHS = st.lists(st.integers(1, 32), min_size=3, max_size=3)
NEW = 10
RAGGED = prompts(33, 2, 18)


def draws(layer: int, head: int, step: int) -> list[float]:
    key = jax.random.key(5)
    for number in (layer, head, step):
        key = jax.random.fold_in(key, number)
    return jax.random.uniform(key, (64,)).tolist()


@GROUPS
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=LENGTHS, knobs=st.sampled_from([{"k": 6, "sinks": 2}, {"k": 4, "frozen": True}]))
def test_equals_the_oracle(config, lengths, knobs):
    policy = random_slots(seed=5, **knobs)
    assert_equals_oracle(policy, lambda: NumpyRandomSlots(draws=draws, **knobs), prompts(*lengths), NEW, config)


@pytest.mark.parametrize("frozen", [False, True])
def test_every_slot_is_as_likely_as_every_other(frozen):
    # so that the mass on the selection is, in the mean, (k - 1) / (length - 1) of what is not on self
    length, k, draws = 20, 8, 500
    method = random_slots(k, frozen=frozen).method
    assert isinstance(method, Selecting)
    cache = empty_cache("head_major", layers=1, batch=1, kv_heads=2, capacity=32, head_dim=8, dtype=jnp.float32)
    token, lengths = Token(*(jnp.zeros((1, heads, 8)) for heads in (4, 4, 2, 2))), jnp.array([length])

    def select(layer, step):
        scores = method.scorer.score(token, cache, (), Here(layer, lengths, step, jnp.ones(1, bool)))
        return method.selector.select(scores, lengths, implementation="xla")

    # frozen numbers are drawn once per layer and head
    axes = (0, None) if frozen else (None, 0)
    numbers = tuple(jnp.arange(draws) if axis == 0 else jnp.int32(1) for axis in axes)
    selections = np.asarray(jax.jit(jax.vmap(select, axes))(*numbers))
    times = np.bincount(selections.ravel(), minlength=length)
    trials, share = 2 * draws, (k - 1) / (length - 1)
    assert times[-1] == trials
    # five standard deviations: for 19 slots, one seed in 90,000 fails
    np.testing.assert_allclose(times[:-1], trials * share, atol=5 * np.sqrt(trials * share * (1 - share)))


def test_draws_differ_between_layers_heads_steps_and_seeds():
    _, (drawn, *_) = run(random_slots(6, sinks=2, seed=5), RAGGED, NEW, ONE_TO_ONE)
    _, (of_another_seed, *_) = run(random_slots(6, sinks=2, seed=6), RAGGED, NEW, ONE_TO_ONE)
    assert drawn[0][0] != drawn[1][0] and drawn[0][0] != of_another_seed[0][0]
    assert drawn[0][0][0] != drawn[0][0][1]
    assert set(drawn[0][0][0]) - {33} != set(drawn[0][1][0]) - {34}


def test_frozen_only_new_tokens_displace_a_slot():
    _, (drawn, *_) = run(random_slots(4, seed=5, frozen=True), RAGGED, NEW, ONE_TO_ONE)
    for layer in drawn.values():
        for step, (before, after) in enumerate(itertools.pairwise(layer)):
            for old, new in zip(before, after, strict=True):
                present = 33 + step + 1
                assert present in new and len(new) == 4
                # one has gone: self of the step before, unless it was drawn in the place of another
                assert len(set(old) - set(new)) == 1 and set(new) <= {*old, present}


def test_a_budget_above_the_length_is_full_attention_and_a_small_one_is_not():
    dense = dense_tokens(RAGGED, NEW, ALL_SHARE)
    assert run(random_slots(64, sinks=3), RAGGED, NEW, ALL_SHARE)[0].tokens == dense
    assert run(random_slots(4, seed=5, frozen=True), RAGGED, NEW, ALL_SHARE)[0].tokens != dense


def test_a_row_of_a_batch_is_the_row_alone():
    # in a cache of another capacity, too
    policy = random_slots(6, sinks=2, seed=5)
    together, selections = run(policy, RAGGED, NEW, ALL_SHARE)
    alone, selections_alone = run(policy, RAGGED[1:2], NEW, ALL_SHARE, capacity=300)
    assert alone.tokens == together.tokens[1:2] and selections_alone == selections[1:2]


@pytest.mark.parametrize(
    ("knobs", "message"), [({"k": 0}, "k=0 must be at least 1"), ({"k": 4, "sinks": 4}, "sinks=4 must be between 0")]
)
def test_refuses(knobs, message):
    with pytest.raises(ValueError, match=message):
        random_slots(**knobs)
