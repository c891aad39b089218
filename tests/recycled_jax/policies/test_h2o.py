"""H2O against its plain-numpy oracle, what it accumulates, and the policies it must coincide with."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax.decode import begin, decode_step
from recycled_jax.generate import read
from recycled_jax.policies.h2o import ColumnSums, h2o
from tests.recycled_jax.policies.h2o_numpy import NumpyH2O
from tests.recycled_jax.policies.numpy_llama import Full, NumpyLlama
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, run
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

RAGGED = prompts(33, 5, 17)
NEW = 12
# the longest row is given, so that all batches have one shape
LENGTHS = st.tuples(st.just(33), st.integers(1, 33), st.integers(1, 33))


@pytest.mark.parametrize(
    ("config", "knobs"),
    [
        (ONE_TO_ONE, {"recent": 0, "accumulation": "normalised"}),
        (ALL_SHARE, {}),
    ],
    ids=["group 1, normalised", "group 4"],
)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=LENGTHS, k=st.sampled_from([4, 11]))
def test_equals_the_oracle(config, knobs, lengths, k):
    assert_equals_oracle(h2o(k, **knobs), lambda: NumpyH2O(k=k, **knobs), prompts(*lengths), NEW, config)


def test_the_prompt_gives_as_much_attention_as_it_has_queries():
    # each query gives 1 in all, in each of its heads
    model, params = tiny_model()
    policies = [h2o(8, group_reduction=reduction) for reduction in ("mean", "sum", "max")]
    prefilled = read(model, params, RAGGED, policies=policies, max_new_tokens=NEW, chunk=16)
    mean, total, largest = (
        np.asarray(prefilled.prompts.seen(ColumnSums(reduction))).sum(axis=-1) for reduction in ("mean", "sum", "max")
    )
    queries = np.broadcast_to(np.array([len(prompt) for prompt in RAGGED])[None, :, None], mean.shape)
    np.testing.assert_allclose(mean, queries, rtol=1e-5)
    np.testing.assert_allclose(total, CONFIG.group * queries, rtol=1e-5)
    assert (largest >= queries - 1e-3).all() and (largest < total).all()


def test_without_heavy_hitters_it_is_a_sliding_window():
    _, slots = run(h2o(8, recent=7), RAGGED, NEW)
    for row, prompt in enumerate(RAGGED):
        for steps in slots[row].values():
            for length, heads in enumerate(steps, len(prompt) + 1):
                assert heads == [list(range(max(0, length - 8), length))] * CONFIG.kv_heads


def test_a_budget_above_the_length_is_full_attention():
    ours, _ = run(h2o(64), RAGGED, NEW)
    _, params = tiny_model()
    assert ours.tokens == [NumpyLlama(CONFIG, params, Full()).generate(prompt, NEW) for prompt in RAGGED]
    np.testing.assert_array_equal(ours.telemetry.kv_bytes_per_token(), ours.telemetry.dense_kv_bytes_per_token())
    np.testing.assert_array_equal(ours.telemetry.kv_bytes_per_token(), ours.telemetry.dense_kv_bytes_per_token())


def test_a_padded_row_is_the_row_alone_and_the_full_cache_is_not_needed():
    together, slots = run(h2o(11), RAGGED, NEW, ALL_SHARE)
    for row, prompt in enumerate(RAGGED):
        alone, own = run(h2o(11, keep_cache=False), [prompt], NEW, ALL_SHARE, chunk=48)
        assert own[0] == slots[row] and alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-5)


def test_without_the_full_cache_the_state_does_not_grow_with_the_capacity():
    model, params = tiny_model()

    def size(capacity: int, **knobs) -> int:
        policy = h2o(8, **knobs)

        def leaves():
            prefilled = read(model, params, RAGGED, policies=[policy], max_new_tokens=NEW, capacity=capacity, chunk=16)
            return jax.tree.leaves(begin(policy, prefilled))

        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.eval_shape(leaves))

    assert size(128, keep_cache=False) == size(512, keep_cache=False) < size(128) < size(512)


def test_rows_that_have_stopped_keep_what_they_hold():
    model, params = tiny_model()
    policy = h2o(8)
    prefilled = read(model, params, RAGGED, policies=[policy], max_new_tokens=2, chunk=16)

    @jax.jit
    def step(params, prefilled, token, active):
        before = begin(policy, prefilled)
        return before.kept, decode_step(model, params, before, token, policy=policy, active=active)[1].kept

    before, after = step(params, prefilled, jnp.array([1, 2, 3]), jnp.array([True, False, True]))
    for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(was[:, 1], now[:, 1])
        assert (np.asarray(was[:, 0]) != np.asarray(now[:, 0])).any()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": 8, "recent": 8}, "recent=8 must be between 0 and k - 1 = 7"),
        ({"k": 8, "recent": -1}, "recent=-1 must be between 0 and k - 1 = 7"),
        ({"accumulation": "mean"}, "accumulation='mean' must be one of original, normalised"),
        ({"group_reduction": "first"}, "group_reduction='first' must be one of"),
    ],
    ids=str,
)
def test_bad_knobs_are_refused(knobs, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        h2o(**knobs)
