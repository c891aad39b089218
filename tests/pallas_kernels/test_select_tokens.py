"""select_tokens: which slots are kept, and in which order they are evicted."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops.select_tokens.api import IMPLEMENTATIONS, select_tokens
from tests.pallas_kernels.arg_specs import jitted

TOKENS = 12
PORTABLE = ("reference", "xla")  # the kernel has a file of its own: the interpreter takes its time
# k below, at and above the number of slots, or no more than is always kept; windows up to wider than the row; each
# way of sharing with more and with fewer entries than candidates.
CONFIGS = (
    {"k": 1},
    {"k": 4},
    {"k": 5, "pool": 3},
    {"k": 12, "pool": 7},
    {"k": 17, "pool": 3},
    {"k": 6, "pool": 5, "sinks": 2},
    {"k": 3, "sinks": 2},
    {"k": 15, "pool": 25, "sinks": 3},
    {"k": 7, "recent": 3},
    {"k": 6, "sinks": 2, "recent": 4},
    {"k": 30, "pool": 3, "sinks": 3, "recent": 14},
    {"k": 5, "shared": "max", "pool": 3},
    {"k": 5, "shared": "sum"},
    {"k": 8, "shared": "sum", "pool": 3, "sinks": 1, "recent": 2},
    {"k": 6, "shared": "union"},
    {"k": 20, "shared": "union", "pool": 3, "sinks": 1, "recent": 2},
)


def named(config) -> str:
    return "_".join(f"{name}{value}" for name, value in config.items())


def select_plainly(heads, length, *, k, pool=1, sinks=0, recent=1, shared=None):
    """One row in plain Python: `heads` has a list of float32 scores of all slots, the first `length` of them in use."""
    candidates = range(sinks, max(length - recent, sinks))
    m = k - sinks - recent
    strengths = [
        {slot: max(scores[near] for near in candidates if abs(near - slot) <= pool // 2) for slot in candidates}
        for scores in heads
    ]
    join = {"max": max, "sum": functools.partial(functools.reduce, add)}
    if shared in join:
        strengths = [{slot: join[shared]([head[slot] for head in strengths]) for slot in candidates}]
    lists = [sorted(candidates, key=lambda slot, head=head: (-head[slot], slot))[:m] for head in strengths]
    if shared == "union":
        by_rank = [slot for choices in zip(*lists, strict=True) for slot in choices]
        lists = [list(dict.fromkeys(by_rank))[:m]]
    newest = [slot if slot >= sinks else -1 for slot in range(length - recent, length)]
    first = [slot if slot < length else -1 for slot in range(sinks)]
    return [[-1] * (m - len(chosen)) + chosen[::-1] + newest + first for chosen in lists]


def add(a, b):
    """In float32, held within its finite range."""
    with np.errstate(over="ignore"):
        return np.clip(np.float32(a) + np.float32(b), np.finfo(np.float32).min, np.finfo(np.float32).max)


# Few values, so that equal scores are common. Both zeros are equal; a policy may rank by negative numbers.
scores_of_a_row = st.lists(
    st.sampled_from([0.0, -0.0, 1e-30, 0.25, 0.5, 1.0, -1.0, -3e38]), min_size=TOKENS, max_size=TOKENS
)


@pytest.mark.parametrize("config", CONFIGS, ids=named)
@pytest.mark.parametrize("implementation", PORTABLE)
def test_matches_plain_python(implementation, config):
    select = jax.jit(functools.partial(select_tokens, **config, implementation=implementation))

    @hypothesis.given(
        rows=st.lists(st.tuples(scores_of_a_row, scores_of_a_row), min_size=2, max_size=2),
        lengths=st.lists(st.integers(0, TOKENS), min_size=2, max_size=2),
    )
    @hypothesis.settings(max_examples=30)
    def check(rows, lengths):
        scores = np.array(rows, np.float32)
        expected = [
            select_plainly(heads, length, **config) for heads, length in zip(scores.tolist(), lengths, strict=True)
        ]
        padding = np.arange(TOKENS) >= np.array(lengths)[:, None, None]
        poisoned = jnp.asarray(np.where(padding, np.float32(np.nan), scores))
        positions = select(poisoned, jnp.array(lengths, jnp.int32))
        assert positions.dtype == jnp.int32
        assert positions.tolist() == expected

    check()


@pytest.mark.parametrize("implementation", PORTABLE)
def test_in_any_order_the_set_is_the_same(implementation):
    scores = jnp.array([[[5, 1, 1, 9, 1, 1, 7, 8], [1, 2, 3, 4, 4, 3, 2, 1]]], jnp.float32)
    select = functools.partial(jitted, select_tokens, k=6, sinks=1, implementation=implementation)
    in_order, in_any_order = (select(ordered=ordered)(scores, jnp.array([8])) for ordered in (True, False))
    assert jnp.sort(in_any_order[..., :4]).tolist() == jnp.sort(in_order[..., :4]).tolist()
    assert in_any_order[..., 4:].tolist() == in_order[..., 4:].tolist()


def worked(scores, length, implementation, **options):
    select = jitted(select_tokens, implementation=implementation, **options)
    return select(jnp.array([scores], jnp.float32), jnp.array([length]))[0, 0].tolist()


@pytest.mark.parametrize("implementation", PORTABLE)
def test_worked_by_hand(implementation):
    scores = [[5, 1, 1, 9, 1, 1, 7, 8]]  # slot 6 is self at length 7; slot 7 is padding then
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
    # The three newest slots, oldest first; candidates are 0..3.
    assert by_hand(length=7, k=5, recent=3) == [0, 3, 4, 5, 6]
    # A row no longer than what is always kept: a slot that is both recent and a sink stands among the sinks.
    assert by_hand(length=3, k=6, recent=3, sinks=2) == [-1, -1, -1, 2, 0, 1]
    assert by_hand(length=2, k=4, recent=3) == [-1, -1, 0, 1]


@pytest.mark.parametrize("implementation", PORTABLE)
def test_shared_worked_by_hand(implementation):
    heads = [[4, 3, 0, 0, 2, 9], [0, 1, 2, 6, 3, 9]]  # slot 5 is self
    by_hand = functools.partial(worked, heads, length=6, implementation=implementation)
    # The larger of the two: 4 3 2 6 3. Of slots 1 and 4 the lower is kept.
    assert by_hand(k=4, shared="max") == [1, 0, 3, 5]
    # The sum: 4 4 2 6 5.
    assert by_hand(k=4, shared="sum") == [0, 4, 3, 5]
    # The heads' lists are 0 1 4 2 3 and 3 4 2 1 0; by rank 0 3, 1 4, 4 2: slot 4 has its turn as head 1's second.
    assert by_hand(k=4, shared="union") == [1, 3, 0, 5]
    assert by_hand(k=5, shared="union") == [4, 1, 3, 0, 5]
    assert by_hand(k=7, shared="union") == [-1, 2, 4, 1, 3, 0, 5]


def test_scores_may_be_bfloat16():
    scores = jnp.array([[[1, 3, 2, 0]]], jnp.bfloat16)
    assert select_tokens(scores, jnp.array([4]), k=3).tolist() == [[[2, 1, 3]]]


@pytest.mark.parametrize("shared", [None, "sum", "union"])
def test_approximate_selection_reaches_its_recall(shared):
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 4096)), jnp.float32)
    select = functools.partial(
        select_tokens, scores, jnp.array([4096, 3000]), k=257, shared=shared, implementation="xla"
    )
    exact, approximate = np.asarray(select()), np.asarray(select(recall=0.9))
    assert approximate.shape == exact.shape
    found = [np.isin(a, b).mean() for a, b in zip(approximate.reshape(-1, 257), exact.reshape(-1, 257), strict=True)]
    assert np.mean(found) >= 0.9
    assert all(len(set(row)) == 257 for row in approximate.reshape(-1, 257).tolist())


def test_recall_below_one_compiles_to_the_approximate_top_k():
    def program(recall):
        select = functools.partial(select_tokens, k=17, recall=recall, implementation="xla")
        return str(jax.make_jaxpr(select)(jnp.zeros((1, 2, 512)), jnp.array([512])))

    assert "recall_target=0.8" in program(0.8)
    assert "approx_top_k" not in program(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 4, "recent": 0}, "recent=0 leaves out self"),
        ({"k": 4, "recent": 3, "sinks": 2}, r"k=4 is below sinks \+ recent = 5"),
        ({"k": 4, "shared": "mean"}, "shared='mean' is not known; expected one of: None, max, sum, union"),
        ({"k": 4, "recall": 0.0}, "recall=0.0 is not a share"),
        ({"k": 4, "recall": 1.5}, "recall=1.5 is not a share"),
    ],
)
def test_mistake_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        select_tokens(jnp.zeros((2, 2, 10)), jnp.array([10, 3]), **options)


def test_every_implementation_is_tested():
    assert set(IMPLEMENTATIONS) == {*PORTABLE, "pallas_tpu"}
