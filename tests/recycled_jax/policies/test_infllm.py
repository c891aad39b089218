"""InfLLM's blocks against their oracle, and where they coincide with single slots."""

from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from recycled_jax.policies.infllm import Blocks, infllm
from tests.recycled_jax.policies.infllm_numpy import NumpyInfLLM, middle_blocks
from tests.recycled_jax.policies.numpy_llama import NumpyPolicy, best
from tests.recycled_jax.policies.record import (
    ALL_SHARE,
    ONE_TO_ONE,
    assert_equals_oracle,
    assert_rows_alone,
    dense_tokens,
    run,
)
from tests.recycled_jax.random_model import prompts

NEW = 14
# one row fills the chunks, so that all batches have one shape
ROWS = st.lists(st.integers(1, 32), min_size=3, max_size=3).map(lambda lengths: prompts(32, *lengths))
KNOBS: dict[str, Any] = {"block": 4, "sinks": 3, "recent": 5, "representatives": 2}


@pytest.mark.parametrize("config", [ONE_TO_ONE, ALL_SHARE], ids=["group 1", "group 4"])
@settings(max_examples=3, deadline=None, derandomize=True)
@given(rows=ROWS, k=st.sampled_from([13, 20]))
def test_equals_the_oracle(config, rows, k):
    assert_equals_oracle(infllm(k, **KNOBS), lambda: NumpyInfLLM(k=k, **KNOBS), rows, NEW, config)


def test_a_long_recent_window_and_blocks_that_do_not_divide_the_cache_equal_the_oracle():
    knobs: dict[str, Any] = {"k": 27, "block": 5, "sinks": 0, "recent": 12, "representatives": 3}
    assert_equals_oracle(infllm(**knobs), lambda: NumpyInfLLM(**knobs), prompts(32, 7, 21, 1), NEW)


class _TopKOfSummedLogits(NumpyPolicy):
    """Single slots by the sum of all heads' logits, between 3 sinks and 5 recent slots."""

    def __init__(self):
        self.selected = {}

    def attention(self, layer, step):
        middle = range(3, layer.length - 5)
        heads = range(layer.config.query_heads)
        logits = np.sum([layer.logits(layer.q[-1][head], head, middle) for head in heads], axis=0)
        kept = {
            *range(3),
            *range(layer.length - 5, layer.length),
            *(middle[place] for place in best(list(logits), 13 - 8)),
        }
        slots = sorted(slot for slot in kept if 0 <= slot < layer.length)
        self.selected.setdefault(layer.number, []).append([slots])
        return layer.attend(layer.q[-1], [slots] * layer.config.kv_heads)


def test_blocks_of_one_slot_are_top_k_on_logits_summed_over_the_heads():
    policy = infllm(13, **KNOBS | {"block": 1, "representatives": 1})
    assert_equals_oracle(policy, _TopKOfSummedLogits, prompts(32, 7, 21, 1), NEW)


def test_a_budget_above_the_length_is_full_attention():
    rows = prompts(32, 7, 21, 1)
    assert run(infllm(46, **KNOBS), rows, NEW)[0].tokens == dense_tokens(rows, NEW)


def test_a_row_of_a_batch_is_the_row_alone():
    policy, rows = infllm(13, **KNOBS), prompts(32, 7, 21, 1)
    assert_rows_alone(policy, rows, NEW, (0, 2), ALL_SHARE)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(9, 2, 3, 2), (16, 4, 4, 4), (17, 5, 0, 1)]),
)
def test_selections_hold_the_best_blocks_and_what_is_always_kept(lengths, seed, shape):
    k, block, sinks, recent = shape
    blocks = Blocks(k, block, sinks, recent)
    scores = np.random.default_rng(seed).normal(size=(3, 2, blocks.count(23))).astype(np.float32)
    positions = np.asarray(blocks.select(jnp.asarray(scores), jnp.array(lengths)))
    for row, length in enumerate(lengths):
        middle = middle_blocks(length, block=block, sinks=sinks, recent=recent)
        for head in range(2):
            held = positions[row, head][positions[row, head] >= 0].tolist()
            strongest = best([scores[row, head, slots[0] // block] for slots in middle], blocks.budget)
            expected = {slot for place in strongest for slot in middle[place]}
            expected |= {*range(min(sinks, length)), *range(max(0, length - recent), length)}
            assert sorted(held) == (sorted(expected) if length > k else list(range(length)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 4300}, r"k=4300 leaves no room for a block: it must be at least sinks \+ recent \+ block = 4352"),
        ({"block": 0}, r"block=0 must be at least 1 slot"),
        ({"sinks": -1}, r"sinks=-1 must be at least 0"),
        ({"recent": 0}, r"recent=0 must be at least 1 slot: the current token"),
        ({"representatives": 129}, r"representatives=129 must be between 1 and block = 128"),
    ],
    ids=str,
)
def test_knobs_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        infllm(**knobs)
