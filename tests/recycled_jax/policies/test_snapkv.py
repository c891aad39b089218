"""SnapKV against its plain-numpy oracle, its parts by hand, and the policies it must coincide with."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax.decode import begin
from recycled_jax.frame import FixedStride, Here, LastQueries, Recycling, Token, TopK
from recycled_jax.generate import read
from recycled_jax.policies.policy import Policy
from recycled_jax.policies.recycled import recycled
from recycled_jax.policies.snapkv import WindowScorer, average, snapkv
from tests.recycled_jax.policies.numpy_llama import Full, NumpyLlama
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, run
from tests.recycled_jax.policies.refreshkv_numpy import NumpyRefreshKV
from tests.recycled_jax.policies.snapkv_numpy import NumpySnapKV
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

RAGGED = prompts(33, 5, 17)
NEW = 12
# the longest row is given, so that all batches have one shape
LENGTHS = st.tuples(st.just(33), st.integers(1, 33), st.integers(1, 33))


@pytest.mark.parametrize(
    ("config", "knobs", "tail", "budgets"),
    [
        (ONE_TO_ONE, {"window": 3}, NEW, [11]),
        (ALL_SHARE, {"window": 4, "pool": 3, "pooling": "max"}, 0, [4, 11]),
        (CONFIG, {"window": 2, "pooling": "avg_padded", "group_reduction": "mean"}, 5, [4]),
    ],
    ids=["group 1, growing", "group 4, evicting", "group 2, a short tail"],
)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=LENGTHS, data=st.data())
def test_equals_the_oracle(config, knobs, tail, budgets, lengths, data):
    k = data.draw(st.sampled_from(budgets))
    # a tail that holds the whole answer is the paper's, which grows
    oracle_tail = None if tail == NEW else tail
    oracle = functools.partial(NumpySnapKV, k=k, tail=oracle_tail, **knobs)
    assert_equals_oracle(snapkv(k, tail=tail, **knobs), oracle, prompts(*lengths), NEW, config)


def test_window_one_and_pool_seven_is_refreshkv_never_refreshed():
    # a stride beyond the answer never comes round
    ours, slots = run(snapkv(16, window=1, pool=7, pooling="max", tail=0), RAGGED, NEW)
    theirs, recycled_slots = run(recycled(16, stride=16), RAGGED, NEW)
    assert not theirs.telemetry.refreshed.any()
    assert slots == recycled_slots and ours.tokens == theirs.tokens
    for row, log_probs in enumerate(theirs.log_probs):
        np.testing.assert_allclose(ours.log_probs[row], log_probs, atol=1e-5)


def test_a_window_of_one_that_is_refreshed_is_refreshkv():
    ours, _ = run(Policy("refreshed", Recycling(WindowScorer(1), TopK(8, pool=7), FixedStride(4))), RAGGED, NEW)
    assert ours.telemetry.refreshed.any()
    _, params = tiny_model()
    for row, prompt in enumerate(RAGGED):
        theirs = NumpyLlama(CONFIG, params, NumpyRefreshKV(k=8, stride=4))
        assert ours.tokens[row] == theirs.generate(prompt, NEW)


def test_a_budget_above_the_prompt_with_room_for_the_answer_is_full_attention():
    ours, _ = run(snapkv(48, tail=NEW), RAGGED, NEW)
    _, params = tiny_model()
    assert ours.tokens == [NumpyLlama(CONFIG, params, Full()).generate(prompt, NEW) for prompt in RAGGED]
    np.testing.assert_array_equal(ours.telemetry.kv_bytes_per_token(), ours.telemetry.dense_kv_bytes_per_token())


def test_the_window_moves_with_the_tokens():
    # a prompt two tokens longer, or two tokens more after it: the same window, wherever a query lies in it
    model, params = tiny_model()
    scorer, seen = WindowScorer(5), LastQueries(5)
    longer = prompts(14, 3, 9)
    policy = Policy("refreshed", Recycling(scorer, TopK(8), FixedStride(4)))

    def window(rows):
        prefilled = read(model, params, rows, policies=[policy], max_new_tokens=NEW, chunk=16)
        return prefilled.prompts.seen(seen).q, scorer.begin(prefilled, implementation=None)

    queries, expected = window(longer)
    _, state = window([row[:-2] for row in longer])
    kv = jnp.zeros((3, CONFIG.kv_heads, CONFIG.head_dim))
    lengths = jnp.array([len(row) for row in longer], jnp.int32)

    def append(state, layer: int, place: int, active: bool):
        q = queries[layer, :, :, place]
        here = Here(jnp.int32(layer), lengths + 1 + place, jnp.int32(1), jnp.full(3, active))
        return scorer.append(state, Token(q, q, kv, kv), here)

    for layer in range(CONFIG.layers):
        for place in (-2, -1):
            assert (append(state, layer, place, active=False) == state).all()
            state = append(state, layer, place, active=True)
    np.testing.assert_allclose(state, expected, atol=1e-5)


def test_averages_by_hand():
    scores = jnp.array([[[6.0, 3.0, 0.0, 9.0, 100.0, 100.0]], [[5.0, 100.0, 100.0, 100.0, 100.0, 100.0]]])
    lengths = jnp.array([4, 1])
    # slots 0 to 3 of the first row, slot 0 of the second; the others are in the window
    mean, padded = (np.asarray(average(scores, lengths, 3, padded=padded)) for padded in (False, True))
    np.testing.assert_allclose(mean[0, 0, :4], [4.5, 3.0, 4.0, 4.5])
    np.testing.assert_allclose(padded[0, 0, :4], [3.0, 3.0, 4.0, 3.0])
    np.testing.assert_allclose([mean[1, 0, 0], padded[1, 0, 0]], [5.0, 5 / 3])


def test_a_padded_row_is_the_row_alone_and_the_full_cache_is_not_needed():
    together, slots = run(snapkv(11, 3, tail=NEW), RAGGED, NEW, ONE_TO_ONE)
    for row, prompt in enumerate(RAGGED):
        alone, own = run(snapkv(11, 3, tail=NEW, keep_cache=False), [prompt], NEW, ONE_TO_ONE, chunk=48)
        assert own[0] == slots[row] and alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-5)


def test_without_the_full_cache_the_state_does_not_grow_with_the_capacity():
    model, params = tiny_model()

    def size(capacity: int, **knobs) -> int:
        policy = snapkv(8, window=3, tail=0, **knobs)

        def leaves():
            prefilled = read(model, params, RAGGED, policies=[policy], max_new_tokens=NEW, capacity=capacity, chunk=16)
            return jax.tree.leaves(begin(policy, prefilled))

        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.eval_shape(leaves))

    assert size(128, keep_cache=False) == size(512, keep_cache=False) < size(128) < size(512)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 8}, "window=32 is above k=8"),
        ({"k": 0, "window": 0}, "window=0 must be at least 1"),
        ({"pool": 4}, "pool=4 must be odd"),
        ({"pool": 4, "pooling": "max"}, "pool=4 must be odd"),
        ({"pooling": "mean"}, "pooling='mean' must be one of avg, avg_padded, max"),
        ({"tail": -1}, "tail=-1 must be at least 0"),
        ({"group_reduction": "median"}, "group_reduction='median' must be one of"),
    ],
    ids=str,
)
def test_bad_knobs_are_refused(knobs, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        snapkv(**knobs)
