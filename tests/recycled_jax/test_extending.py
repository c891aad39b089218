"""Reading on is reading: what was read with new tokens after it equals what a fresh prefill makes of all of them."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Int8HeadMajor, empty_cache
from recycled_jax.decode import read_on, read_prompts
from recycled_jax.extending import extend, repeat_rows
from recycled_jax.frame import DensePrefill, Observer, Prefilled
from recycled_jax.generate import generate, read
from recycled_jax.policies import POLICIES, make_policy
from recycled_jax.prefill.registry import PREFILLS, make_prefill
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

KNOBS = {
    "long-heads": {"k": 64, "chunk": 16},
    "infllm": {"k": 64, "block": 8, "sinks": 8, "recent": 16},
    "composed": {"selector": {"name": "top-k", "k": 32}},
}
EVERY = [make_policy(name, **KNOBS.get(name, {})) for name in POLICIES]
READ_DENSELY = [policy for policy in EVERY if policy.prefill == DensePrefill()]


def joined(rows, suffixes):
    return [row + suffix for row, suffix in zip(rows, suffixes, strict=True)]


def run_read(rows, *, policies=(), max_new_tokens=1, chunk=16, **options) -> Prefilled:
    return read(*tiny_model(), rows, policies=policies, max_new_tokens=max_new_tokens, chunk=chunk, **options)


def run_extend(prefilled, suffixes, *, max_new_tokens=1, chunk=16, **options) -> Prefilled:
    return extend(*tiny_model(), prefilled, suffixes, max_new_tokens=max_new_tokens, chunk=chunk, **options)


def assert_equal(ours: Prefilled, fresh: Prefilled):
    """Logits, keys, values and what observers keep, apart from rounding."""
    assert ours.prompts.observers == fresh.prompts.observers
    assert ours.cache.capacity == fresh.cache.capacity
    np.testing.assert_array_equal(ours.prompts.lengths, fresh.prompts.lengths)
    np.testing.assert_allclose(ours.prompts.logits, fresh.prompts.logits, atol=1e-5)
    for a, b in zip(*(jax.tree.leaves(of.prompts.observed) for of in (ours, fresh)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    for layer in range(CONFIG.layers):
        for stored in ("keys", "values"):
            here, there = (getattr(of.cache, stored)(layer) for of in (ours, fresh))
            for row, length in enumerate(np.asarray(fresh.prompts.lengths)):
                np.testing.assert_allclose(here[row, :, :length], there[row, :, :length], atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "added"),
    [
        ((11, 4), (1, 5)),
        ((11, 30), (37, 1)),  # more than a chunk, and across where chunks of a fresh prefill begin
        ((110, 5), (3, 40)),  # the first row's later pieces lie beyond the end of the cache
        ((9, 9), (6, 20)),  # all rows from one slot on
    ],
)
def test_equals_a_fresh_prefill_for_every_observer(lengths, added):
    rows, suffixes = prompts(*lengths), prompts(*added, seed=2)
    read_rows = functools.partial(run_read, policies=READ_DENSELY, capacity=128)
    assert len({type(o) for o in read_rows(rows).prompts.observers}) == 5  # the way to read, and four observers
    assert_equal(run_extend(read_rows(rows), suffixes), read_rows(joined(rows, suffixes)))


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("full", {}),
        ("recycled", {"k": 8, "stride": 4}),
        ("snapkv", {"k": 16, "window": 4}),
        ("quest", {"k": 12, "page": 4}),
        ("streaming", {"k": 8}),
    ],
)
def test_policies_go_on_as_from_a_fresh_prefill(name, knobs):
    policy, rows, suffixes = make_policy(name, **knobs), prompts(21, 13), prompts(2, 7, seed=2)
    ours = run_extend(run_read(rows, policies=[policy]), suffixes, max_new_tokens=12)
    fresh = run_read(joined(rows, suffixes), policies=[policy], max_new_tokens=12)
    ours, fresh = (generate(*tiny_model(), of, policy=policy, max_new_tokens=12, block=8) for of in (ours, fresh))
    assert ours.tokens == fresh.tokens
    np.testing.assert_allclose(ours.log_probs, fresh.log_probs, atol=1e-5)


def test_a_cache_is_given_more_slots_where_it_needs_them():
    rows, suffixes, more = prompts(122, 60), prompts(20, 3, seed=2), prompts(1, 1, seed=3)
    first = run_read(rows)
    grown = run_extend(first, suffixes)
    assert (first.cache.capacity, grown.cache.capacity) == (128, 256)
    assert_equal(grown, run_read(joined(rows, suffixes)))
    twice = run_extend(grown, more, keep=False)  # from here on, in place
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(grown.cache))
    assert_equal(twice, run_read(joined(joined(rows, suffixes), more)))
    assert_equal(run_extend(first, more, capacity=130), run_read(joined(rows, more), capacity=256))


def test_an_int8_cache_is_given_more_slots():
    rows, suffixes = prompts(122, 60), prompts(20, 3, seed=2)
    ours = run_extend(run_read(rows, cache_dtype="int8"), suffixes)
    assert (type(ours.cache), ours.cache.capacity) == (Int8HeadMajor, 256)
    fresh = run_read(joined(rows, suffixes), cache_dtype="int8")
    np.testing.assert_allclose(ours.prompts.logits, fresh.prompts.logits, atol=0.05)  # rounded in other places
    before = run_read(rows, cache_dtype="int8").cache
    for name in ("k", "k_scales", "v", "v_scales"):  # what was read is not touched
        np.testing.assert_array_equal(getattr(ours.cache, name)[:, 1, :, :60], getattr(before, name)[:, 1, :, :60])


def test_rows_share_a_context():
    contexts, suffixes = prompts(11, 40), prompts(5, 1, 9, seed=2)
    policy = make_policy("snapkv", k=16, window=8)
    shared = repeat_rows(run_read(contexts, policies=[policy]), [1, 0, 1])
    whole = joined([contexts[1], contexts[0], contexts[1]], suffixes)
    assert_equal(run_extend(shared, suffixes), run_read(whole, policies=[policy]))


def test_the_layout_of_tpus():
    rows, suffixes = prompts(11, 124), prompts(5, 9, seed=2)
    ours = run_extend(repeat_rows(token_major(run_read(rows)), [1, 0]), suffixes)
    assert_equal(ours, run_read(joined(rows[::-1], suffixes)))


def token_major(prefilled: Prefilled) -> Prefilled:
    shape, old = prefilled.cache.shape._asdict(), prefilled.cache
    cache = empty_cache("token_major", **shape, dtype=old.dtype)
    for layer in range(old.layers):
        cache = cache.write(layer, 0, old.keys(layer), old.values(layer))
    return Prefilled(cache, prefilled.prompts)


@dataclass(frozen=True)
class Columns(Observer):
    """How many tokens, padding included, went through each layer."""

    def start(self, config, *, batch, capacity, dtype):
        return jnp.zeros((config.layers, batch), jnp.int32)

    def observe(self, seen, chunk, cache):
        return seen.at[chunk.layer].add(chunk.q.shape[2])


def test_only_new_tokens_go_through_the_layers():
    model, params = tiny_model()
    tokens, lengths = jnp.zeros((2, 96), jnp.int32), jnp.array([90, 83])
    first = read_prompts(model, params, tokens, lengths, capacity=128, chunk=32, observers=(Columns(),))
    assert np.unique(first.prompts.seen(Columns())).tolist() == [96]
    for added in (16, 3):
        extended = run_extend(first, prompts(added, 2), chunk=512)
        assert np.unique(extended.prompts.seen(Columns())).tolist() == [96 + 16]


def test_work_is_that_of_the_new_tokens():
    """16 tokens after 8,192 take a 513th of the products of a fresh prefill. (Attention's loop over the cache counts as
    one block in both; layers stand apart, and each program reads one chunk, so that nothing else is in a loop.)"""
    model, params = tiny_model()
    stack = params["params"]["layers"]
    apart = tuple(jax.tree.map(lambda x, layer=layer: x[layer], stack) for layer in range(CONFIG.layers))
    params = {"params": {**params["params"], "layers": apart}}

    def fresh(tokens):
        counts = jnp.array([tokens.shape[1]])
        return read_prompts(model, params, tokens, counts, capacity=8320, chunk=tokens.shape[1])

    def more(arrays, tokens):
        before = tree.unflatten(arrays)
        first, counts = before.prompts.lengths, jnp.array([16])
        return read_on(model, params, before, tokens, counts, first=first, chunk=16)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    question, both = (jax.ShapeDtypeStruct((1, size), jnp.int32) for size in (16, 8208))
    before = jax.jit(fresh)(jnp.zeros((1, 16), jnp.int32))  # in a cache of the size; how long it is, no program sees
    arrays, tree = jax.tree.flatten(before)
    assert 0.9 < 513 * flops(more, arrays, question) / flops(fresh, both) < 1.1


@functools.cache
def small() -> Prefilled:
    return run_read(prompts(11, 4))


@pytest.mark.parametrize(
    ("suffixes", "options", "message"),
    [
        ([[1]], {}, "suffixes has 1 rows, expected 2, one for each prompt"),
        ([[1], []], {}, r"suffixes\[1\] is empty, expected at least one token"),
        ([[], []], {}, r"suffixes\[0\] is empty, expected at least one token"),
        ([[1], [48]], {}, r"suffixes\[1\] holds token id 48, expected ids from 0 to 47"),
        ([[1], [2]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1], [2]], {"chunk": 0}, "chunk=0 must be at least 1"),
        ([[1], [2]], {"capacity": 12}, "capacity=12 is too small .* 13 slots are needed"),
    ],
)
def test_refuses_what_cannot_be(suffixes, options, message):
    with pytest.raises(ValueError, match=message):
        run_extend(small(), suffixes, **options)


SPARSE = {name: make_prefill(name) for name in PREFILLS if name != "dense"}
OWN = {policy.name: policy.prefill for policy in EVERY if policy not in READ_DENSELY}


@pytest.mark.parametrize("name", [*SPARSE, *OWN])
def test_refuses_prompts_whose_reading_depends_on_chunks(name):
    way, record = {**SPARSE, **OWN}[name], small().prompts
    record = record.replace(observers=(way, *record.observers[1:]))
    with pytest.raises(ValueError, match=f"read with {type(way).__name__}.* cannot be extended, expected .* densely"):
        run_extend(Prefilled(small().cache, record), [[1], [2]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "rows is empty"), ([0, 2], "rows holds 2, expected rows from 0 to 1"), ([-1], "holds -1")],
)
def test_refuses_rows_that_there_are_not(rows, message):
    with pytest.raises(ValueError, match=message):
        repeat_rows(small(), rows)
