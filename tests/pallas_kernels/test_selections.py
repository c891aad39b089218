"""gather_selection, selection_attention and gather_attention: one query step over a selection."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, gather_attention, gather_selection, selection_attention
from pallas_kernels.ops.gather_attention.api import IMPLEMENTATIONS as GATHER_ATTENTION
from pallas_kernels.ops.gather_selection.api import IMPLEMENTATIONS as GATHER_SELECTION
from pallas_kernels.ops.selection_attention.api import IMPLEMENTATIONS as SELECTION_ATTENTION
from tests.pallas_kernels.arg_specs import (
    ARG_SPECS,
    ArgSpec,
    assert_close,
    cache_arguments,
    generator,
    jitted,
    masked,
    normal,
)

BUDGET = 10
by_name = functools.partial(pytest.mark.parametrize, ids=lambda spec: spec.name)


def random_positions(spec: ArgSpec, key: jax.Array) -> jax.Array:
    """Slots in use in any order, with repeats, about a quarter of the entries empty; all in an empty row."""
    random = generator(key)
    shape = (spec.batch, spec.kv_heads, BUDGET)
    lengths = np.array(spec.lengths)[:, None, None]
    slots = random.integers(0, np.maximum(lengths, 1), shape, dtype=np.int32)
    return jnp.asarray(np.where((random.random(shape) < 0.25) | (lengths == 0), -1, slots), jnp.int32)


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize("implementation", sorted(GATHER_SELECTION))
def test_gather_selection_is_indexing(implementation, spec, getkey):
    args = cache_arguments(spec, getkey)
    positions = random_positions(spec, getkey())
    gather = jitted(gather_selection, implementation=implementation)
    selected = gather(args.k_poisoned, args.v_poisoned, positions)
    for actual, cache in zip(selected, (args.k, args.v), strict=True):
        expected = np.zeros((*positions.shape, spec.head_dim), np.float32)
        for row, head, entry in np.argwhere(np.asarray(positions) >= 0):
            expected[row, head, entry] = cache[row, head, positions[row, head, entry]]
        assert actual.dtype == cache.dtype
        np.testing.assert_array_equal(np.asarray(actual, np.float32), expected)


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize("implementation", sorted(SELECTION_ATTENTION))
def test_selection_attention_matches_oracle(implementation, spec, getkey):
    args = cache_arguments(spec, getkey)
    positions = random_positions(spec, getkey())
    valid = np.asarray(positions) >= 0
    k_sel, v_sel = jitted(gather_selection, implementation="reference")(args.k, args.v, positions)
    oracle = jitted(selection_attention, implementation="reference")
    expected = oracle(args.q, k_sel, v_sel, jnp.asarray(valid))
    # Entries that are not valid hold what was there before: anything, if the values are finite.
    k_poisoned, v_poisoned = masked(valid[..., None], k_sel, np.nan), masked(valid[..., None], v_sel, 1e30)
    attend = jitted(selection_attention, implementation=implementation)
    assert_close(attend(args.q, k_poisoned, v_poisoned, jnp.asarray(valid)), expected, spec.tolerance)


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize("implementation", sorted(GATHER_ATTENTION))
def test_gather_attention_is_gather_then_attend(implementation, spec, getkey):
    args = cache_arguments(spec, getkey)
    positions = random_positions(spec, getkey())
    k_sel, v_sel = jitted(gather_selection, implementation="reference")(args.k, args.v, positions)
    valid = jnp.asarray(np.asarray(positions) >= 0)
    expected = jitted(selection_attention, implementation="reference")(args.q, k_sel, v_sel, valid)
    attend = jitted(gather_attention, implementation=implementation)
    assert_close(attend(args.q, args.k_poisoned, args.v_poisoned, positions), expected, spec.tolerance)


@pytest.mark.parametrize("implementation", sorted(GATHER_ATTENTION))
def test_worked_by_hand(implementation):
    # head_dim 1, scale 1, q = 1: weights 1, 2, 5 at slots 0, 1, 2.
    # Slot 1 twice and slot 2 once: (2*3 + 2*3 + 5*6) / (2 + 2 + 5)
    q = jnp.ones((1, 1, 1))
    k = jnp.log(jnp.array([[[[1.0], [2.0], [5.0]]]]))
    v = jnp.array([[[[100.0], [3.0], [6.0]]]])
    positions = jnp.array([[[1, -1, 2, 1]]])
    out = gather_attention(q, k, v, positions, scale=1.0, implementation=implementation)
    np.testing.assert_allclose(out, [[[42 / 9]]], rtol=1e-6)


def test_empty_kv_head_beside_a_full_one(getkey):
    """Validity is per kv head: one with no valid entry gives zeros, its neighbour is not touched."""
    q = normal(getkey(), (1, 4, 16), "float32")
    k_sel, v_sel = (normal(getkey(), (1, 2, 6, 16), "float32") for _ in range(2))
    valid = jnp.array([[[False] * 6, [True] * 6]])
    attend = jitted(selection_attention)
    out = attend(q, k_sel, v_sel, valid)
    alone = attend(q[:, 2:], k_sel[:, 1:], v_sel[:, 1:], valid[:, 1:])
    assert not np.asarray(out[:, :2]).any()
    np.testing.assert_array_equal(out[:, 2:], alone)


def test_selecting_everything_equals_full_attention(getkey):
    """In slot order, with as many entries as slots, XLA is bit-equal to attention over the cache."""
    q = normal(getkey(), (2, 4, 16), "float32")
    k, v = (normal(getkey(), (2, 2, 30, 16), "float32") for _ in range(2))
    lengths = jnp.array([30, 11])
    slots = jnp.broadcast_to(jnp.arange(30), (2, 2, 30))
    positions = jnp.where(slots < lengths[:, None, None], slots, -1)
    expected = jitted(decode_attention, implementation="xla")(q, k, v, lengths)
    actual = jitted(gather_attention, implementation="xla")(q, k, v, positions)
    np.testing.assert_array_equal(actual, expected)
