"""select_tokens: which slots are kept, and in which order they are evicted."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import select_tokens
from pallas_kernels.ops.select_tokens.api import IMPLEMENTATIONS

TOKENS = 12
# (k, pool, sinks): k below, at and above the number of slots, or no more than is always kept; windows up to
# wider than the row.
CONFIGS = ((1, 1, 0), (4, 1, 0), (5, 3, 0), (12, 7, 0), (17, 3, 0), (6, 5, 2), (3, 1, 2), (15, 25, 3))


def select_plainly(scores: list[float], length: int, k: int, pool: int, sinks: int) -> list[int]:
    """One head in plain Python: `scores` of all slots, the first `length` of them in use."""
    candidates = range(sinks, max(length - 1, sinks))
    strength = {slot: max(scores[near] for near in candidates if abs(near - slot) <= pool // 2) for slot in candidates}
    strongest_first = sorted(candidates, key=lambda slot: (-strength[slot], slot))[: k - sinks - 1]
    weakest_first = strongest_first[::-1]
    missing = [-1] * (k - sinks - 1 - len(weakest_first))
    itself = [length - 1 if length - 1 >= sinks else -1]
    return missing + weakest_first + itself + [slot if slot < length else -1 for slot in range(sinks)]


# Few values, so that equal scores are common. Both zeros are equal; a policy may rank by negative numbers.
scores_of_a_row = st.lists(
    st.sampled_from([0.0, -0.0, 1e-30, 0.25, 0.5, 1.0, -1.0, -3e38]), min_size=TOKENS, max_size=TOKENS
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "k{}_pool{}_sinks{}".format(*config))
@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_matches_plain_python(implementation, config):
    k, pool, sinks = config
    select = jax.jit(functools.partial(select_tokens, k=k, pool=pool, sinks=sinks, implementation=implementation))

    @hypothesis.given(
        rows=st.lists(st.tuples(scores_of_a_row, scores_of_a_row), min_size=2, max_size=2),
        lengths=st.lists(st.integers(0, TOKENS), min_size=2, max_size=2),
    )
    @hypothesis.settings(max_examples=50)
    def check(rows, lengths):
        scores = np.array(rows, np.float32)
        expected = [
            [select_plainly(head, length, k, pool, sinks) for head in heads]
            for heads, length in zip(scores.tolist(), lengths, strict=True)
        ]
        padding = np.arange(TOKENS) >= np.array(lengths)[:, None, None]
        poisoned = jnp.asarray(np.where(padding, np.float32(np.nan), scores))
        positions = select(poisoned, jnp.array(lengths, jnp.int32))
        assert positions.dtype == jnp.int32
        assert positions.tolist() == expected

    check()


def worked(scores, length, implementation, **options):
    scores = jnp.array([[scores]], jnp.float32)
    return select_tokens(scores, jnp.array([length]), implementation=implementation, **options)[0, 0].tolist()


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_worked_by_hand(implementation):
    scores = [5, 1, 1, 9, 1, 1, 7, 8]  # slot 6 is self at length 7; slot 7 is padding then
    by_hand = functools.partial(worked, scores, implementation=implementation)
    # Candidates 0..5 without pooling: 9 (slot 3), 5 (slot 0), then the 1s, lower slots first.
    assert by_hand(length=7, k=4) == [1, 0, 3, 6]
    # With window 3 the strengths are 5 5 9 9 9 1: slot 5 does not see self's 7. Of equals the lower is kept.
    assert by_hand(length=7, k=4, pool=3) == [4, 3, 2, 6]
    assert by_hand(length=7, k=7, pool=3) == [5, 1, 0, 4, 3, 2, 6]
    # Fewer candidates than entries: the empty ones come first, so they are overwritten first.
    assert by_hand(length=3, k=5) == [-1, -1, 1, 0, 2]
    assert by_hand(length=1, k=3) == [-1, -1, 0]
    assert by_hand(length=0, k=3) == [-1, -1, -1]
    # Two sinks: their entries are the last two, and their scores count for nothing, not even through pooling:
    # the strengths of slots 2..5 are 9 9 9 1.
    assert by_hand(length=7, k=6, pool=3, sinks=2) == [4, 3, 2, 6, 0, 1]
    # Self is a sink: it stands in its reserved entry only, and the sink after it is not in use yet.
    assert by_hand(length=2, k=5, sinks=3) == [-1, -1, 0, 1, -1]
    assert by_hand(length=8, k=1) == [7]


def test_scores_may_be_bfloat16():
    scores = jnp.array([[[1, 3, 2, 0]]], jnp.bfloat16)
    assert select_tokens(scores, jnp.array([4]), k=3).tolist() == [[[2, 1, 3]]]
