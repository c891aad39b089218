"""Recycling over steps and layers: against its plain-numpy oracle, and its limits, which are RefreshKV, TidalDecode,
LessIsMore, exact top-k and dense attention."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax.generate import generate
from recycled_jax.policies import make_policy
from recycled_jax.policies.recycled_tidal import recycled_tidal
from tests.recycled_jax.policies.less_is_more_numpy import NumpyLessIsMore
from tests.recycled_jax.policies.numpy_llama import NumpyLlama
from tests.recycled_jax.policies.record import assert_equals_oracle, run
from tests.recycled_jax.policies.recycled_tidal_numpy import NumpyRecycledTidal
from tests.recycled_jax.policies.refreshkv_numpy import NumpyRefreshKV
from tests.recycled_jax.policies.tidal_numpy import NumpyTidal
from tests.recycled_jax.policies.top_k_numpy import NumpyTopK
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

ALONE = dataclasses.replace(CONFIG, kv_heads=4)  # every query head has its own keys
GROUPED = dataclasses.replace(CONFIG, kv_heads=1)
TWO = {"dense_layers": (), "selection_layers": (0, 2)}
BOTTOM = {"dense_layers": (), "selection_layers": (0,)}
ONE = {"dense_layers": (0,), "selection_layers": (1,)}
ALL = {"dense_layers": (), "selection_layers": (0, 1, 2)}
# RefreshKV's selections: of each kv head, pooled, nothing kept but the present token
OF_EACH_HEAD = {"shared": None, "group_reduction": "max", "sinks": 0}
# long enough between refreshes that tokens of the recent window are evicted, too
FIXED = {"k": 12, "stride": 10, "sinks": 2, **ONE}
DYNAMIC = {"k": 16, "stride": 2, "threshold": 0.3, "max_stride": 9, "sinks": 2, "refresh": "selection", **TWO}
RAGGED = prompts(29, 5, 40)
NEW = 14

# The longest row fixes the shape that prompts are padded to, so that a new example is not a new program.
lengths = st.tuples(st.integers(1, 40), st.integers(1, 16), st.integers(33, 48))


@pytest.mark.parametrize(
    ("config", "knobs", "recent_ratio", "recent"),
    [(ALONE, FIXED, 0.5, 4), (GROUPED, DYNAMIC, 0.25, 2)],
    ids=["fixed, group of one", "dynamic, group of four"],
)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=lengths)
def test_equals_the_oracle_on_a_ragged_batch(config, knobs, recent_ratio, recent, lengths):
    policy = recycled_tidal(recent_ratio=recent_ratio, **knobs)
    rows = prompts(*lengths, seed=sum(lengths))
    assert_equals_oracle(policy, lambda: NumpyRecycledTidal(recent=recent, **knobs), rows, NEW, config)


def test_selection_layers_decide_alone_and_the_layers_above_obey():
    result, selections = run(recycled_tidal(**DYNAMIC), RAGGED, NEW, GROUPED)
    refreshed = result.telemetry.refreshed
    _, params = tiny_model(GROUPED)
    for row, prompt in enumerate(RAGGED):
        oracle = NumpyRecycledTidal(**DYNAMIC, recent=2)
        NumpyLlama(GROUPED, params, oracle).generate(prompt, NEW)
        for layer, parent in ((0, 0), (1, 0), (2, 2)):
            assert (np.flatnonzero(refreshed[:, layer, row]) + 1).tolist() == oracle.refreshes[parent]
            assert selections[row][layer] == selections[row][parent]
    assert (refreshed[:, 0] & ~refreshed[:, 2]).any() and (refreshed[:, 2] & ~refreshed[:, 0]).any()


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("recycled", {"stride": 4}),
        ("recycled-dynamic", {"stride": 2, "threshold": 0.3, "max_stride": 9, "refresh": "selection"}),
    ],
    ids=str,
)
def test_selecting_in_every_layer_is_refreshkv(name, knobs):
    ours = recycled_tidal(k=16, pool=7, recent_ratio=1 / 16, **knobs, **ALL, **OF_EACH_HEAD)
    theirs = make_policy(name, k=16, pool=7, **knobs)
    # the same parts in the same roles
    assert dataclasses.replace(ours.method, layers=theirs.method.layers) == theirs.method
    assert ours.method.plan.roles(CONFIG.layers) == theirs.method.plan.roles(CONFIG.layers)


REFRESHKV = {"k": 16, "stride": 2, "threshold": 0.3, "max_stride": 9, "pool": 7, "refresh": "selection"}


def dynamic_in_every_layer(rows):
    policy = recycled_tidal(recent_ratio=1 / 16, **REFRESHKV, **ALL, **OF_EACH_HEAD)
    model, params = tiny_model()
    return generate(model, params, rows, policy=policy, max_new_tokens=NEW, chunk=48, block=NEW)


def test_selecting_in_every_layer_equals_the_oracle_of_refreshkv():
    result = dynamic_in_every_layer(RAGGED)
    _, params = tiny_model()
    for row, prompt in enumerate(RAGGED):
        oracle = NumpyRefreshKV(**REFRESHKV)
        assert result.tokens[row] == NumpyLlama(CONFIG, params, oracle).generate(prompt, NEW)
        for layer, steps in oracle.refreshes.items():
            assert (np.flatnonzero(result.telemetry.refreshed[:, layer, row]) + 1).tolist() == steps


def test_a_padded_row_is_the_row_alone():
    together = dynamic_in_every_layer(RAGGED)
    for row, prompt in enumerate(RAGGED):
        alone = dynamic_in_every_layer([prompt])
        assert together.tokens[row] == alone.tokens[0]
        np.testing.assert_array_equal(together.telemetry.refreshed[:, :, row], alone.telemetry.refreshed[:, :, 0])


@pytest.mark.parametrize(
    ("knobs", "oracle"),
    [
        (
            {"k": 8, "recent_ratio": 1 / 8, "refresh": "selection", **OF_EACH_HEAD},
            lambda: NumpyTidal(k=8, output="selection", **BOTTOM),
        ),
        ({"k": 24}, lambda: NumpyLessIsMore(k=24, **BOTTOM)),
    ],
    ids=["TidalDecode", "LessIsMore"],
)
def test_a_refresh_at_every_step_is_recycling_over_layers_alone(knobs, oracle):
    result, selections = run(recycled_tidal(stride=1, **knobs, **BOTTOM), RAGGED, NEW)
    _, params = tiny_model()
    for row, prompt in enumerate(RAGGED):
        numpy_policy = oracle()
        assert result.tokens[row] == NumpyLlama(CONFIG, params, numpy_policy).generate(prompt, NEW)
        for layer, steps in numpy_policy.selected.items():
            # a shared selection is told once there, here for the buffer of every kv head
            assert selections[row][layer] == [heads * (CONFIG.kv_heads // len(heads)) for heads in steps]


def test_at_every_step_and_in_every_layer_it_is_dense_bit_for_bit():
    result, _ = run(recycled_tidal(k=8, stride=1, **ALL), RAGGED, NEW)
    dense, _ = run(make_policy("full"), RAGGED, NEW)
    assert result.tokens == dense.tokens and result.log_probs == dense.log_probs


def test_at_every_step_and_in_every_layer_its_selections_are_exact_top_k():
    policy = recycled_tidal(k=8, stride=1, refresh="selection", recent_ratio=1 / 8, **ALL, **OF_EACH_HEAD)
    assert_equals_oracle(policy, lambda: NumpyTopK(k=8), RAGGED, NEW)


def test_the_recent_window_is_evicted_last_and_the_sinks_never():
    _, selections = run(recycled_tidal(recent_ratio=0.5, **FIXED), RAGGED, NEW, ALONE)
    k, sinks, recent = 12, {0, 1}, 4
    for row in (0, 2):  # those with more than k tokens
        length, scored = len(RAGGED[row]), None
        for step in range(1, 10):
            (slots, *others) = map(set, selections[row][2][step - 1])
            assert all(slots == other for other in others)
            evicted = max(0, step - (k - len(sinks) - recent))
            kept = {*range(length - recent + evicted, length + step)} | sinks
            assert slots >= kept and len(slots) == k
            assert scored is None or slots - kept < scored or not slots - kept
            scored = slots - kept
        assert evicted == 3 and not scored


def test_a_budget_above_the_length_is_full_attention():
    result, _ = run(recycled_tidal(k=64, stride=5, **ALL), RAGGED, NEW)
    dense, _ = run(make_policy("full"), RAGGED, NEW)
    assert result.tokens == dense.tokens
    for ours, theirs in zip(result.log_probs, dense.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_buffers_hold_corrected_keys_and_values():
    knobs = {"k": 16, "stride": 8, "correct_every": 5, **ALL}
    model, params = tiny_model()
    result = generate(model, params, RAGGED, policy=recycled_tidal(**knobs), max_new_tokens=20, chunk=16, block=8)
    plain = []
    for row, prompt in enumerate(RAGGED):
        assert result.tokens[row] == NumpyLlama(CONFIG, params, NumpyRecycledTidal(**knobs)).generate(prompt, 20)
        uncorrected = NumpyRecycledTidal(**knobs | {"correct_every": None})
        plain.append(NumpyLlama(CONFIG, params, uncorrected).generate(prompt, 20))
    assert result.tokens != plain


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"shared": None}, "shared=None needs a group_reduction"),
        ({"max_stride": 20}, "max_stride=20 needs a threshold: without one, the stride is fixed"),
        ({"k": 16, "stride": 13}, "stride=13 is above k - sinks = 12"),
        ({"k": 16, "threshold": 0.5, "max_stride": 14}, "max_stride=14 is above k - sinks = 12"),
        ({"recent_ratio": -0.1}, "recent_ratio=-0.1 must be between 0 and 1"),
        ({"stride": 0}, "stride=0 must be at least 1"),
        ({"selection_layers": (1, 7)}, "layer 1 is among the dense layers and among the selection layers"),
        ({"rows": "all", "threshold": 0.5, "correct_every": 0}, "correct_every=0 must be at least 1 step"),
    ],
    ids=str,
)
def test_values_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        recycled_tidal(**knobs)
