"""gather_selection, selection_attention and gather_attention: one query step over a selection."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from pallas_kernels import (
    KVCache,
    decode_attention,
    from_heads,
    gather_attention,
    gather_selection,
    selection_attention,
)
from pallas_kernels.cache import Layout
from tests.pallas_kernels.arg_specs import (
    ARG_SPECS,
    IMPLEMENTATIONS_AND_LAYOUTS,
    LAYER,
    LAYERS,
    ArgSpec,
    CacheArguments,
    assert_close,
    cache_arguments,
    generator,
    jitted,
    masked,
    normal,
    stacked,
)

BUDGET = 10
# "pallas_tpu" has no scores of entries.
WITH_SCORES = [pair for pair in IMPLEMENTATIONS_AND_LAYOUTS if pair[0] != "pallas_tpu"]
by_name = functools.partial(pytest.mark.parametrize, ids=lambda spec: spec.name)


def random_positions(spec: ArgSpec, key: jax.Array) -> jax.Array:
    """Slots in use in any order, with repeats, about a quarter of the entries empty; all in an empty row."""
    random = generator(key)
    shape = (spec.batch, spec.kv_heads, BUDGET)
    lengths = np.array(spec.lengths)[:, None, None]
    slots = random.integers(0, np.maximum(lengths, 1), shape, dtype=np.int32)
    return jnp.asarray(np.where((random.random(shape) < 0.25) | (lengths == 0), -1, slots), jnp.int32)


def selected(args: CacheArguments, positions: jax.Array, layout: Layout = "head_major") -> KVCache:
    """What `gather_selection` is to give, by indexing: a compact buffer with zeros in empty entries."""
    filled = np.asarray(positions)[..., None] >= 0
    k, v = (
        masked(filled, jnp.take_along_axis(stored, jnp.maximum(positions, 0)[..., None], axis=2), 0)
        for stored in (args.k, args.v)
    )
    return stacked(layout, k, v)


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_gather_selection_is_indexing(implementation, layout, spec, getkey):
    args = cache_arguments(spec, getkey)
    positions = random_positions(spec, getkey())
    gather = jitted(gather_selection, implementation=implementation)
    cache = args.poisoned(layout)
    compact = gather(cache, positions, cache.empty_like(capacity=BUDGET), layer=LAYER)
    expected = selected(args, positions)
    for part in ("keys", "values"):
        actual = np.asarray(getattr(compact, part)(LAYER), np.float32)
        np.testing.assert_array_equal(actual, np.asarray(getattr(expected, part)(LAYER), np.float32))
        for layer in set(range(LAYERS)) - {LAYER}:
            assert not np.asarray(getattr(compact, part)(layer), np.float32).any()  # as it was


@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_gather_selection_leaves_the_other_rows(implementation, layout, getkey):
    spec = ARG_SPECS[1]
    args = cache_arguments(spec, getkey)
    positions = random_positions(spec, getkey())
    rows = np.array([True, False, True, False])
    old = jax.tree.map(lambda x: jnp.full_like(x, 7), args.cache(layout).empty_like(capacity=BUDGET))
    gather = jitted(gather_selection, implementation=implementation)
    compact = gather(args.poisoned(layout), positions, old, layer=LAYER, rows=jnp.asarray(rows))
    expected = selected(args, positions).keys(LAYER)
    np.testing.assert_array_equal(compact.keys(LAYER), np.where(rows[:, None, None, None], expected, 7))


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize("heads", ["own", "shared"])
@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_selection_attention_matches_oracle(implementation, layout, heads, spec, getkey):
    args = cache_arguments(spec, getkey)
    positions = random_positions(spec, getkey())
    positions = positions if heads == "own" else positions[:, :1]
    everyone = jnp.broadcast_to(positions, (spec.batch, spec.kv_heads, BUDGET))
    clean, valid = selected(args, everyone), jnp.asarray(np.asarray(positions) >= 0)
    expected = jitted(selection_attention, implementation="reference")(args.q, clean, valid, layer=LAYER)
    # Entries that are not valid hold what was there before: anything, if the values are finite.
    filled = np.asarray(everyone)[..., None] >= 0
    poisoned = stacked(layout, masked(filled, clean.keys(LAYER), np.nan), masked(filled, clean.values(LAYER), 1e30))
    attend = jitted(selection_attention, implementation=implementation)
    assert_close(attend(args.q, poisoned, valid, layer=LAYER), expected, spec.tolerance)


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize("heads", ["own", "shared"])
@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_gather_attention_is_gather_then_attend(implementation, layout, heads, spec, getkey):
    args = cache_arguments(spec, getkey)
    positions = random_positions(spec, getkey())
    positions = positions if heads == "own" else positions[:, :1]
    everyone = jnp.broadcast_to(positions, (spec.batch, spec.kv_heads, BUDGET))
    valid = jnp.asarray(np.asarray(everyone) >= 0)
    oracle = jitted(selection_attention, implementation="reference")
    expected = oracle(args.q, selected(args, everyone), valid, layer=LAYER)
    attend = jitted(gather_attention, implementation=implementation)
    assert_close(attend(args.q, args.poisoned(layout), positions, layer=LAYER), expected, spec.tolerance)


@by_name("spec", ARG_SPECS)
@pytest.mark.parametrize("group_reduction", ["max", "none"])
@pytest.mark.parametrize(("implementation", "layout"), WITH_SCORES)
def test_selection_attention_gives_scores_of_entries(implementation, layout, group_reduction, spec, getkey):
    """As `decode_attention` does of a cache that holds the valid entries alone."""
    args = cache_arguments(spec, getkey)
    valid = jnp.arange(spec.tokens)[None, None, :] < args.lengths[:, None, None]
    options = {"return_scores": True, "group_reduction": group_reduction}
    expected = jitted(decode_attention, implementation="reference", **options)(
        args.q, args.cache(), args.lengths, layer=LAYER
    )
    attend = jitted(selection_attention, implementation=implementation, **options)
    out, scores = attend(args.q, args.poisoned(layout), valid, layer=LAYER)
    assert_close(out, expected[0], spec.tolerance)
    assert_close(scores, expected[1], 3e-6)


@pytest.mark.parametrize(("implementation", "layout"), IMPLEMENTATIONS_AND_LAYOUTS)
def test_worked_by_hand(implementation, layout):
    # head_dim 1, scale 1, q = 1: weights 1, 2, 5 at slots 0, 1, 2.
    # Slot 1 twice and slot 2 once: (2*3 + 2*3 + 5*6) / (2 + 2 + 5)
    k = jnp.log(jnp.array([[[[1.0], [2.0], [5.0]]]]))
    v = jnp.array([[[[100.0], [3.0], [6.0]]]])
    attend = jitted(gather_attention, scale=1.0, implementation=implementation)
    out = attend(jnp.ones((1, 1, 1)), from_heads(layout, k, v), jnp.array([[[1, -1, 2, 1]]]))
    np.testing.assert_allclose(out, [[[42 / 9]]], rtol=1e-6)


def test_empty_kv_head_beside_a_full_one(getkey):
    """Validity is per kv head: one with no valid entry gives zeros, its neighbour is not touched."""
    q = normal(getkey(), (1, 4, 16), "float32")
    k, v = (normal(getkey(), (1, 2, 6, 16), "float32") for _ in range(2))
    valid = jnp.array([[[False] * 6, [True] * 6]])
    attend = jitted(selection_attention)
    out = attend(q, from_heads("head_major", k, v), valid)
    alone = attend(q[:, 2:], from_heads("head_major", k[:, 1:], v[:, 1:]), valid[:, 1:])
    assert not np.asarray(out[:, :2]).any()
    np.testing.assert_array_equal(out[:, 2:], alone)


def test_selecting_everything_equals_full_attention(getkey):
    """In slot order, with as many entries as slots, XLA is bit-equal to attention over the cache."""
    q = normal(getkey(), (2, 4, 16), "float32")
    cache = from_heads("head_major", *(normal(getkey(), (2, 2, 30, 16), "float32") for _ in range(2)))
    lengths = jnp.array([30, 11])
    slots = jnp.broadcast_to(jnp.arange(30), (2, 2, 30))
    positions = jnp.where(slots < lengths[:, None, None], slots, -1)
    expected = jitted(decode_attention, implementation="xla")(q, cache, lengths)
    actual = jitted(gather_attention, implementation="xla")(q, cache, positions)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_selection_attention_is_differentiable(implementation, getkey):
    """Training attends fixed selections: gradients of queries, keys and values against finite differences."""
    q = normal(getkey(), (1, 4, 16), "float32")
    cache = from_heads("head_major", *(normal(getkey(), (1, 2, 6, 16), "float32") for _ in range(2)))
    valid = jnp.array([[[True, False, True, True, False, True]] * 2])

    def attend(*args):  # which are numpy arrays when the differences are taken
        q, cache = jax.tree.map(jnp.asarray, args)
        return selection_attention(q, cache, valid, implementation=implementation)

    jax.test_util.check_grads(attend, (q, cache), order=1, modes=["rev"], rtol=1e-2)
