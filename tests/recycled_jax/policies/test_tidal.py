"""TidalDecode against its plain-numpy oracle and its limits, cache correction, and how its selection layer is found."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax.correction import correct
from recycled_jax.decode import begin, decode_step, read_prompts
from recycled_jax.frame import AttentionScorer, LastQueries, TopK
from recycled_jax.generate import pad
from recycled_jax.policies import make_policy
from recycled_jax.policies.less_is_more import QueryHeadScorer
from recycled_jax.policies.tidal import tidal
from recycled_jax.policies.tidal_calibration import layer_recall, rank_selection_layers
from tests.recycled_jax.policies.less_is_more_numpy import union_weakest_first
from tests.recycled_jax.policies.numpy_llama import Full, NumpyLlama
from tests.recycled_jax.policies.record import assert_equals_oracle, run
from tests.recycled_jax.policies.tidal_numpy import NumpyTidal
from tests.recycled_jax.policies.top_k_numpy import NumpyTopK
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

ALONE = dataclasses.replace(CONFIG, layers=4, kv_heads=4)  # every query head has its own keys
GROUPED = dataclasses.replace(CONFIG, layers=4, kv_heads=1)
TWO = {"dense_layers": (), "selection_layers": (0, 2)}
ONE = {"dense_layers": (0, 1), "selection_layers": (2,)}
ALL = {"dense_layers": (), "selection_layers": (0, 1, 2, 3)}
RAGGED = prompts(29, 5, 40)
NEW = 12

# The longest row fixes the shape that prompts are padded to, so that a new example is not a new program.
lengths = st.tuples(st.integers(1, 40), st.integers(1, 16), st.integers(33, 48))


@pytest.mark.parametrize(
    ("config", "knobs", "oracle_knobs"),
    [
        (ALONE, {"k": 8, **TWO}, {}),
        (
            GROUPED,
            {"k": 16, "group_reduction": "mean", "attends": "selection", **ONE},
            {"group_reduction": "mean", "output": "selection"},
        ),
        (CONFIG, {"k": 8, "dense_layers": (0,), "selection_layers": (1,), "shared": "max"}, {"heads": "all"}),
    ],
    ids=["group of one", "group of four", "one selection for all heads"],
)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=lengths)
def test_equals_the_oracle_on_a_ragged_batch(config, knobs, oracle_knobs, lengths):
    layers = {name: knobs[name] for name in ("k", "dense_layers", "selection_layers")}
    assert_equals_oracle(
        tidal(**knobs), lambda: NumpyTidal(**layers, **oracle_knobs), prompts(*lengths, seed=sum(lengths)), NEW, config
    )


def test_layers_between_hold_the_selection_of_the_nearest_selection_layer_below():
    _, selections = run(tidal(k=8, **TWO), RAGGED, NEW, ALONE)
    for row in selections:
        assert row[1] == row[0] and row[3] == row[2] and row[2] != row[0]


def test_a_budget_above_the_length_is_full_attention():
    result, _ = run(tidal(k=64, attends="selection", **ALL), RAGGED, NEW, ALONE)
    dense, _ = run(make_policy("full"), RAGGED, NEW, ALONE)
    assert result.tokens == dense.tokens
    np.testing.assert_allclose(result.log_probs, dense.log_probs, atol=1e-5)


def test_selecting_in_every_layer_is_full_attention_bit_for_bit():
    result, _ = run(tidal(k=4, **ALL), RAGGED, NEW, ALONE)
    dense, _ = run(make_policy("full"), RAGGED, NEW, ALONE)
    assert result.tokens == dense.tokens and result.log_probs == dense.log_probs


def test_attending_the_selection_in_every_layer_is_exact_top_k():
    assert_equals_oracle(tidal(k=8, attends="selection", **ALL), lambda: NumpyTopK(k=8), RAGGED, NEW, ALONE)


def test_a_padded_row_is_the_row_alone():
    policy = tidal(k=8, **TWO)
    together, selections = run(policy, RAGGED, NEW, ALONE)
    for row, prompt in enumerate(RAGGED[:2]):
        alone, alone_selections = run(policy, [prompt], NEW, ALONE, chunk=32)
        assert together.tokens[row] == alone.tokens[0] and selections[row] == alone_selections[0]


def test_what_it_reads():
    telemetry = run(tidal(k=8, **TWO), RAGGED, NEW, ALONE)[0].telemetry
    for row, prompt in enumerate(RAGGED):
        length = len(prompt) + 1 + np.arange(NEW - 1)
        for layer, expected in enumerate([length, np.minimum(length, 8)] * 2):
            np.testing.assert_array_equal(telemetry.attended[:, layer, row], expected)
    assert not telemetry.scored.any()


# Cache correction


def decode(config, policy, rows, new_tokens):
    """Tokens and last state; after every `policy.correct_every` steps, the correction."""
    model, params = tiny_model(config)
    prefilled = read_into_128(model, params, rows)
    # the steps are the same program whether or not corrections come between them
    state, every, policy = (
        begin(policy, prefilled),
        policy.correct_every,
        dataclasses.replace(policy, correct_every=None),
    )
    tokens = [jnp.argmax(prefilled.prompts.logits, axis=-1)]
    for step in range(1, new_tokens):
        logits, state = _step(model, params, state, tokens[-1], policy=policy)
        tokens.append(jnp.argmax(logits, axis=-1))
        if every is not None and step % every == 0:
            state = _correct(
                model, params, state, jnp.stack(tokens[-1 - every : -1], axis=1), jnp.full(len(rows), every)
            )
    return np.stack(tokens, axis=1).tolist(), state


def read_into_128(model, params, rows, queries=1):
    """Prompts of at most 128 tokens, read into a cache of 128 slots."""
    tokens, lengths = (jnp.asarray(array) for array in pad(rows, model.config.vocab, 128))
    return _read(model, params, tokens, lengths, capacity=128, chunk=128, observers=(LastQueries(queries),))


_read = jax.jit(read_prompts, static_argnames=("model", "capacity", "chunk", "observers"))
_correct = jax.jit(correct, static_argnames="model")


@functools.partial(jax.jit, static_argnames=("model", "policy"))
def _step(model, params, state, token, *, policy):
    return decode_step(model, params, state, token, policy=policy)[:2]


def cache_difference(config, state, rows, tokens):
    """Per layer, the largest between the cache and that of dense prefill over all tokens that went in."""
    model, params = tiny_model(config)
    whole = [prompt + new[:-1] for prompt, new in zip(rows, tokens, strict=True)]
    dense = read_into_128(model, params, whole).cache
    return [
        max(
            float(jnp.max(jnp.abs(ours[row, :, : len(prompt)] - theirs[row, :, : len(prompt)])))
            for ours, theirs in (
                (state.cache.keys(layer), dense.keys(layer)),
                (state.cache.values(layer), dense.values(layer)),
            )
            for row, prompt in enumerate(whole)
        )
        for layer in range(config.layers)
    ]


@pytest.mark.parametrize("every", [2, 5])
def test_after_a_correction_the_cache_is_that_of_dense_decoding(every):
    policy = tidal(k=4, correct_every=every, **TWO)
    tokens, state = decode(GROUPED, policy, RAGGED, 2 * 5 + 1)
    assert max(cache_difference(GROUPED, state, RAGGED, tokens)) < 1e-4


def test_without_correction_layers_above_the_first_that_follows_drift():
    tokens, state = decode(GROUPED, tidal(k=4, **TWO), RAGGED, 11)
    differences = cache_difference(GROUPED, state, RAGGED, tokens)
    # layer 1 attends a selection; its own keys and values still come from dense attention
    assert max(differences[:2]) < 1e-4 and min(differences[2:]) > 0.1


def test_corrected_decoding_equals_the_oracle():
    tokens, _ = decode(GROUPED, tidal(k=4, correct_every=5, **TWO), RAGGED, 14)
    plain, _ = decode(GROUPED, tidal(k=4, **TWO), RAGGED, 14)
    _, params = tiny_model(GROUPED)
    for row, prompt in enumerate(RAGGED):
        oracle = NumpyTidal(k=4, correct_every=5, **TWO)
        assert tokens[row] == NumpyLlama(GROUPED, params, oracle).generate(prompt, 14)
    assert tokens != plain


def test_a_correction_touches_the_counted_tokens_only():
    model, params = tiny_model(GROUPED)
    # the last row ends with the cache: its chunk has to begin before its tokens
    rows = [*prompts(29, 5), prompts(123)[0]]
    policy = tidal(k=4, **TWO)
    prefilled = read_into_128(model, params, rows)
    state, token = begin(policy, prefilled), jnp.argmax(prefilled.prompts.logits, axis=-1)
    tokens = []
    for _ in range(5):
        tokens.append(token)
        logits, state = _step(model, params, state, token, policy=policy)
        token = jnp.argmax(logits, axis=-1)
    assert int(state.lengths[2]) == state.cache.capacity
    counts = jnp.array([5, 0, 3])
    last = jnp.stack(tokens, axis=1)
    aligned = jnp.stack([jnp.roll(row, int(count) - 5) for row, count in zip(last, counts, strict=True)])
    after = _correct(model, params, state, aligned, counts)
    for layer in range(GROUPED.layers):
        changed = jnp.any(after.cache.keys(layer) != state.cache.keys(layer), axis=(1, 3))
        for row, (prompt, count) in enumerate(zip(rows, counts, strict=True)):
            begins, ends = len(prompt) + 5 - int(count), len(prompt) + 5
            places = np.flatnonzero(changed[row])
            assert all(begins <= place < ends for place in places)
            assert layer < 2 or len(places) == count
    np.testing.assert_array_equal(after.lengths, state.lengths)


def test_correction_needs_the_cache_and_room_in_it():
    model, params = tiny_model(GROUPED)
    state = begin(make_policy("full"), read_into_128(model, params, RAGGED))
    with pytest.raises(ValueError, match="tokens has 129 columns, the cache 128 slots"):
        correct(model, params, state, jnp.zeros((3, 129), jnp.int32), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="needs the full cache"):
        correct(model, params, state.replace(cache=None), jnp.zeros((3, 2), jnp.int32), jnp.zeros(3, jnp.int32))


# Which layer should select


@pytest.mark.parametrize("shared", [None, "union"])
def test_recall_of_one_layers_selection_by_anothers(shared):
    k, queries, rows = 6, 3, prompts(20, 7)
    model, params = tiny_model()
    prefilled = read_into_128(model, params, rows, queries)
    scorer, selector = (QueryHeadScorer() if shared else AttentionScorer()), TopK(k, sinks=1, recent=2, shared=shared)
    recall = layer_recall(prefilled, scorer, selector, queries=queries)

    found = []
    for prompt in rows:
        for end in range(len(prompt) - queries, len(prompt)):
            if end + 1 <= k:
                continue
            llama = NumpyLlama(CONFIG, params, Full())
            llama.generate(prompt[: end + 1], 1)
            if shared:
                sets = [[union_weakest_first(layer, k, 1, 2)[: k - 3]] for layer in llama.layers]
            else:
                rule = NumpyTidal(k=k, selection_layers=(), sinks=1, recent=2)
                sets = [[slots[: k - 3] for slots in rule.weakest_first(layer)] for layer in llama.layers]
            found.append([[overlap(first, second) for second in sets] for first in sets])
    np.testing.assert_allclose(recall, np.mean(found, axis=0), atol=1e-6)
    np.testing.assert_allclose(np.diag(recall), 1)
    assert recall[0, 2] < 1 and len(found) == 4  # of the short prompt, one query only has more than k slots to see


def overlap(first, second):
    return np.mean([len({*a} & {*b}) / len(b) for a, b in zip(first, second, strict=True)])


def test_candidates_are_ranked_by_the_mean_recall_of_the_layers_above():
    recall = np.array([[1, 0.2, 0.4, 0.6], [0, 1, 0.8, 0.2], [0, 0, 1, 0.7], [0, 0, 0, 1]])
    ranked = rank_selection_layers(recall, (0, 1, 2))
    assert list(ranked) == [2, 1, 0]
    np.testing.assert_allclose(list(ranked.values()), [0.7, 0.5, 0.4])
    with pytest.raises(ValueError, match="candidate layer 3 has no layers above it; expected 0 to 2"):
        rank_selection_layers(recall, (1, 3))


# Knobs


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"dense_layers": (0, 2)}, "layer 2 is among the dense layers and among the selection layers"),
        ({"correct_every": 0}, "correct_every=0 must be at least 1 step"),
    ],
    ids=str,
)
def test_values_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        tidal(**{"selection_layers": (2, 4)} | knobs)


def test_layers_have_to_fit_the_model():
    assert tidal().method.plan.roles(15)[12:] == ["follow", "select", "follow"]
    with pytest.raises(ValueError, match="layer 13 is in the layer plan, the model has layers 0 to 3"):
        tidal().method.plan.roles(4)
    with pytest.raises(ValueError, match="layer 1 is neither a dense nor a selection layer"):
        tidal(dense_layers=(0,), selection_layers=(2,)).method.plan.roles(4)
