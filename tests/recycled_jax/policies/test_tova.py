"""TOVA against its plain-numpy oracle, and the policies it must coincide with."""

import functools
import itertools

import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax.decode import begin
from recycled_jax.frame import Here, RecyclingState
from recycled_jax.generate import read
from recycled_jax.policies.snapkv import WindowScorer, snapkv
from recycled_jax.policies.tova import tova
from tests.recycled_jax.policies.numpy_llama import Full, NumpyLlama
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, run
from tests.recycled_jax.policies.tova_numpy import NumpyTova
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

RAGGED = prompts(33, 5, 17)
NEW = 12
# the longest row is given, so that all batches have one shape
LENGTHS = st.tuples(st.just(33), st.integers(1, 33), st.integers(1, 33))
WAYS = [(ONE_TO_ONE, False), (ALL_SHARE, True)]


@pytest.mark.parametrize(("config", "protect_self"), WAYS, ids=["group 1", "group 4, protected"])
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=LENGTHS, k=st.sampled_from([4, 11]))
def test_equals_the_oracle(config, protect_self, lengths, k):
    oracle = functools.partial(NumpyTova, k=k, protect_self=protect_self)
    assert_equals_oracle(tova(k, protect_self), oracle, prompts(*lengths), NEW, config)


def first_cut(policy, prefilled) -> list[list[set[int]]]:
    """By layer and row, what is left of the prompt; of one kv head, for that is all there is."""
    kept = jax.jit(begin, static_argnums=0)(policy, prefilled).kept
    positions = kept.selection.positions if isinstance(kept, RecyclingState) else kept.positions
    return [[{int(slot) for slot in row[0] if slot >= 0} for row in layer] for layer in np.asarray(positions)]


def test_first_cut_is_that_of_snapkv():
    # one kv head: the mean over its group is that over all heads. One entry less, for the next token needs one.
    model, params = tiny_model(ALL_SHARE)
    policies = [tova(9, protect_self=True), snapkv(8, window=1, pool=1, tail=0, group_reduction="mean")]
    prefilled = read(model, params, RAGGED, policies=policies, max_new_tokens=NEW, chunk=16)
    ours, theirs = (first_cut(policy, prefilled) for policy in policies)
    assert ours == theirs


def test_first_cut_is_that_of_snapkv_whose_present_token_is_not_forced():
    model, params = tiny_model(ALL_SHARE)
    policy, scorer = tova(9), WindowScorer(1, group_reduction="mean")
    prefilled = read(model, params, RAGGED, policies=[policy], max_new_tokens=NEW, chunk=16)
    lengths = prefilled.prompts.lengths

    @jax.jit
    def score(prefilled, layer):
        here = Here(layer, lengths, layer, lengths > 0)
        return scorer.score_prompt(prefilled, scorer.begin(prefilled, implementation=None), here)

    for layer, rows in enumerate(first_cut(policy, prefilled)):
        scores = np.asarray(score(prefilled, np.int32(layer)))[:, 0]
        for row, left in enumerate(rows):
            assert left == set(np.argsort(-scores[row, : lengths[row]], kind="stable")[:8].tolist())


@pytest.mark.parametrize(("config", "protect_self"), WAYS, ids=["group 1", "group 4, protected"])
def test_the_present_token_may_go_unless_it_is_protected(config, protect_self):
    _, slots = run(tova(4, protect_self), RAGGED, NEW, config)
    steps = [
        (step[0], following[0])
        for row in slots
        for layer in row.values()
        for step, following in itertools.pairwise(layer)
    ]
    gone = [step[-1] not in following for step, following in steps]
    assert any(gone) != protect_self


def test_a_budget_above_the_length_is_full_attention():
    ours, _ = run(tova(64), RAGGED, NEW)
    _, params = tiny_model()
    assert ours.tokens == [NumpyLlama(CONFIG, params, Full()).generate(prompt, NEW) for prompt in RAGGED]
    np.testing.assert_array_equal(ours.telemetry.kv_bytes_per_token(), ours.telemetry.dense_kv_bytes_per_token())


def test_a_padded_row_is_the_row_alone_and_the_full_cache_is_not_needed():
    together, slots = run(tova(11), RAGGED, NEW, ONE_TO_ONE)
    for row, prompt in enumerate(RAGGED):
        alone, own = run(tova(11, keep_cache=False), [prompt], NEW, ONE_TO_ONE, chunk=48)
        assert own[0] == slots[row] and alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-5)


def test_without_the_full_cache_the_state_does_not_grow_with_the_capacity():
    model, params = tiny_model()

    def size(capacity: int, **knobs) -> int:
        policy = tova(8, **knobs)

        def leaves():
            prefilled = read(model, params, RAGGED, policies=[policy], max_new_tokens=NEW, capacity=capacity, chunk=16)
            return jax.tree.leaves(begin(policy, prefilled))

        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.eval_shape(leaves))

    assert size(128, keep_cache=False) == size(512, keep_cache=False) < size(128) < size(512)


def test_bad_knobs_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        tova(0)
