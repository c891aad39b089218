"""The recycling policies against an independent plain-numpy RefreshKV, and against each other where they coincide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recycled_jax.frame import AttentionScorer, Never, Recycling, TopK
from recycled_jax.generate import generate, read, run_block, start
from recycled_jax.policies import Policy, make_policy
from recycled_jax.sampling import Sampling
from recycled_jax.state import DecodeState
from tests.recycled_jax.policies.numpy_llama import NumpyLlama
from tests.recycled_jax.policies.refreshkv_numpy import NumpyRefreshKV
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

RAGGED = prompts(29, 5, 40, 1)
NEW = 24
OPTIONS = {"max_new_tokens": NEW, "chunk": 16, "block": 8}


def run(policy: Policy, rows=RAGGED, **options):
    model, params = tiny_model()
    return generate(model, params, rows, policy=policy, **OPTIONS | options)


def final_state(policy: Policy, rows=RAGGED, *, steps: int = NEW - 1, nested: bool = False) -> DecodeState:
    """The decode state after `steps` steps on the tokens that `policy` itself chooses."""
    model, params = tiny_model()
    prefilled = read(model, params, rows, policies=[policy], max_new_tokens=steps + 1, chunk=16)
    static = {"policy": policy, "sampling": Sampling(), "implementation": None}
    state, _ = start(model, prefilled.cache, prefilled.prompts, jax.random.key(0), **static)
    stride = policy.method.schedule.stride if nested else None
    buffers = steps if stride is None else -(-steps // stride) * stride
    state, _ = run_block(model, params, state, jnp.int32(steps), steps=buffers, stride=stride, coverage=False, **static)
    return state.decode


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("recycled", {"k": 8, "stride": 4}),
        ("recycled", {"k": 8, "stride": 3, "refresh": "selection"}),
        ("recycled", {"k": 16, "stride": 16, "pool": 1}),
        ("recycled-v1", {"k": 8, "stride": 4}),
        ("recycled-dynamic", {"k": 8, "stride": 2, "threshold": 0.6}),
        ("recycled-dynamic", {"k": 12, "stride": 3, "threshold": 0.2, "max_stride": 7}),
    ],
    ids=str,
)
def test_equals_numpy_refreshkv_on_a_ragged_batch(name, knobs):
    policy = make_policy(name, **knobs)
    result = run(policy)
    _, params = tiny_model()
    fired = 0
    for row, prompt in enumerate(RAGGED):
        oracle = NumpyRefreshKV(
            k=knobs["k"],
            stride=knobs["stride"],
            threshold=knobs.get("threshold"),
            max_stride=knobs.get("max_stride", knobs["k"] - 1),
            pool=1 if name == "recycled-v1" else knobs.get("pool", 7),
            heads=1 if name == "recycled-v1" else None,
            refresh=knobs.get("refresh", "full"),
        )
        assert result.tokens[row] == NumpyLlama(CONFIG, params, oracle).generate(prompt, NEW)
        refreshed = [np.flatnonzero(result.telemetry.refreshed[:, layer, row]) + 1 for layer in range(CONFIG.layers)]
        assert [list(steps) for steps in refreshed] == list(oracle.refreshes.values())
        fired += sum(map(len, oracle.refreshes.values()))
    assert fired > 0


@pytest.mark.parametrize("steps", [1, 5, 8, 23])
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("recycled", {"k": 8, "stride": 4}),
        ("recycled-dynamic", {"k": 8, "stride": 2, "threshold": 0.6, "max_stride": 7}),
    ],
    ids=str,
)
def test_selections_equal_numpy_refreshkv(name, knobs, steps):
    state = final_state(make_policy(name, **knobs), steps=steps)
    _, params = tiny_model()
    for row, prompt in enumerate(RAGGED):
        oracle = NumpyRefreshKV(**knobs)
        NumpyLlama(CONFIG, params, oracle).generate(prompt, steps + 1)
        assert np.asarray(state.kept.selection.positions[:, row]).tolist() == oracle.selections()


def test_layers_decide_alone():
    refreshed = run(make_policy("recycled-dynamic", k=8, stride=2, threshold=0.6)).telemetry.refreshed
    assert (refreshed.any(axis=1) & ~refreshed.all(axis=1)).any()


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("recycled", {"k": 64, "stride": 4}),
        ("recycled", {"k": 64, "stride": 4, "refresh": "selection"}),
        ("recycled-dynamic", {"k": 64, "stride": 4, "threshold": 0.5}),
        ("streaming", {"k": 64}),
    ],
    ids=str,
)
def test_a_budget_above_the_length_is_full_attention(name, knobs):
    result, dense = run(make_policy(name, **knobs)), run(make_policy("full"))
    assert result.tokens == dense.tokens
    for ours, theirs in zip(result.log_probs, dense.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_stride_one_is_full_attention_bit_for_bit():
    result, dense = run(make_policy("recycled", k=4, stride=1)), run(make_policy("full"))
    assert result.tokens == dense.tokens and result.log_probs == dense.log_probs


def test_a_small_budget_is_not_full_attention():
    # the identities above would hold for a policy that ignored its budget; this one would not
    assert run(make_policy("recycled", k=4, stride=4)).tokens != run(make_policy("full")).tokens


def test_never_refreshing_is_snapkv_with_window_one_and_pool_seven():
    policy = Policy("snapkv", Recycling(AttentionScorer(), TopK(8, pool=7), Never()))
    result = run(policy, rows=RAGGED[:1])
    # SnapKV's selection is the oracle's first; a stride beyond the answer never comes round
    _, params = tiny_model()
    assert result.tokens[0] == NumpyLlama(CONFIG, params, NumpyRefreshKV(k=8, stride=1000)).generate(RAGGED[0], NEW)
    assert not result.telemetry.refreshed.any()


def test_never_and_always_firing_query_checks_are_the_fixed_extremes():
    always = run(make_policy("recycled-dynamic", k=8, stride=4, threshold=1.5))
    fixed = run(make_policy("recycled", k=8, stride=4))
    assert always.tokens == fixed.tokens and always.log_probs == fixed.log_probs
    never = run(make_policy("recycled-dynamic", k=64, stride=4, threshold=-1.5))
    assert not never.telemetry.refreshed.any()


@pytest.mark.parametrize(("k", "stride"), [(8, 4), (16, 1), (16, 7)])
def test_nested_loop_gives_the_same_tokens_and_the_same_state(k, stride):
    policy = make_policy("recycled", k=k, stride=stride)
    conditional, nested = run(policy), run(policy, loop="nested")
    assert conditional.tokens == nested.tokens and conditional.log_probs == nested.log_probs
    np.testing.assert_array_equal(conditional.telemetry.refreshed, nested.telemetry.refreshed)
    left, right = final_state(policy), final_state(policy, nested=True)
    for ours, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("full", {}),
        ("recycled", {"k": 8, "stride": 4}),
        ("recycled-dynamic", {"k": 8, "stride": 2, "threshold": 0.6}),
        ("streaming", {"k": 8}),
    ],
    ids=str,
)
def test_a_padded_row_is_the_row_alone(name, knobs):
    policy = make_policy(name, **knobs)
    together = run(policy)
    for row, prompt in enumerate(RAGGED):
        alone = run(policy, rows=[prompt])
        assert together.tokens[row] == alone.tokens[0]
        np.testing.assert_allclose(together.log_probs[row], alone.log_probs[0], atol=3e-5)


def test_two_generations_in_a_row_share_nothing():
    policy = make_policy("recycled", k=8, stride=4)
    fresh = run(policy, rows=prompts(9))
    run(policy, rows=prompts(60, seed=5))
    assert run(policy, rows=prompts(9)).tokens == fresh.tokens


def test_streaming_reads_sinks_and_the_recent_window():
    k, sinks, steps = 8, 3, 13
    state = final_state(make_policy("streaming", k=k, sinks=sinks), steps=steps)
    for row, prompt in enumerate(RAGGED):
        length = len(prompt) + steps
        expected = {*range(sinks), *range(max(0, length - (k - sinks)), length)}
        for positions in np.asarray(state.kept.selection.positions[:, row]).reshape(-1, k):
            assert {int(p) for p in positions if p >= 0} == expected


def test_set_after_partial_steps_is_the_best_of_the_refresh_and_the_newest():
    policy = make_policy("recycled", k=8, stride=8)
    at_refresh = np.asarray(final_state(policy, steps=8).kept.selection.positions)
    for partial in (1, 3, 7):
        later = np.asarray(final_state(policy, steps=8 + partial).kept.selection.positions)
        for row, prompt in enumerate(RAGGED):
            newest = [len(prompt) + 8 + step for step in range(partial)]
            expected = np.sort(
                np.concatenate([at_refresh[:, row, :, partial:], np.broadcast_to(newest, (3, 2, partial))], -1)
            )
            np.testing.assert_array_equal(np.sort(later[:, row]), expected)


def test_row_rules():
    per_row = run(make_policy("recycled-dynamic", k=8, stride=2, threshold=0.6)).telemetry
    together = run(make_policy("recycled-dynamic", k=8, stride=2, threshold=0.6, rows="any")).telemetry
    unanimous = run(make_policy("recycled-dynamic", k=8, stride=2, threshold=0.6, rows="all")).telemetry
    assert (per_row.refreshed == per_row.requested).all()
    np.testing.assert_array_equal(
        together.refreshed, np.broadcast_to(together.requested.any(-1, keepdims=True), together.refreshed.shape)
    )
    np.testing.assert_array_equal(
        unanimous.refreshed, np.broadcast_to(unanimous.requested.all(-1, keepdims=True), unanimous.refreshed.shape)
    )
    assert together.refreshed.sum() > per_row.refreshed.sum() > unanimous.refreshed.sum()
    steps = len(together.refreshed)
    np.testing.assert_allclose(together.requested_stride(), steps / together.requested.sum(axis=0))


@pytest.mark.parametrize("rule", ["any", "all"])
def test_stopped_rows_have_no_voice(rule):
    policy = make_policy("recycled-dynamic", k=8, stride=2, threshold=0.6, rows=rule)
    eos = run(policy, rows=RAGGED[:2]).tokens[0][3]
    model, params = tiny_model()
    model = model.clone(config=dataclasses.replace(CONFIG, eos_ids=(eos,)))
    both = generate(model, params, RAGGED[:2], policy=policy, **OPTIONS)
    stopped = both.telemetry.steps[0]
    assert stopped < both.telemetry.steps[1]
    after = both.telemetry.refreshed[stopped:]
    assert not after[:, :, 0].any() and not both.telemetry.requested[stopped:, :, 0].any()
    # alone from there on, the other row refreshes exactly when it wants to
    np.testing.assert_array_equal(after[:, :, 1], both.telemetry.requested[stopped:, :, 1])


def test_coverage_is_the_attention_mass_on_the_selection():
    everything = run(make_policy("recycled", k=64, stride=4), coverage=True).telemetry
    np.testing.assert_allclose(everything.mean_coverage(), 1.0, atol=1e-5)
    little = run(make_policy("recycled", k=4, stride=4), coverage=True).telemetry.mean_coverage()
    assert (little[:, 2] < 0.9).all() and (little > 0).all()


def test_coverage_of_a_row_ends_with_its_last_step():
    # the loop goes on for the other row; what it then records of the first one means nothing
    policy, rows = make_policy("recycled", k=4, stride=4), prompts(11, 4)
    free = run(policy, rows)
    model, params = tiny_model()
    stopping = model.clone(config=dataclasses.replace(CONFIG, eos_ids=(free.tokens[0][3],)))
    done = generate(stopping, params, rows, policy=policy, coverage=True, **OPTIONS).telemetry
    assert done.steps[0] < done.steps[1]
    for row, steps in enumerate(done.steps):
        np.testing.assert_allclose(done.mean_coverage()[:, row], done.coverage[:steps, :, row].mean(axis=0), rtol=1e-5)


def test_overlap_of_successive_selections():
    small = run(make_policy("recycled", k=6, stride=3), rows=RAGGED[:1]).telemetry
    assert np.isnan(small.overlap[~small.refreshed]).all()
    at_refresh = small.overlap[small.refreshed]
    assert (at_refresh >= 0).all() and (at_refresh <= 1).all() and at_refresh.min() < 1
    everything = run(make_policy("recycled", k=64, stride=3), rows=RAGGED[:1]).telemetry
    assert (everything.overlap[everything.refreshed] == 1).all()


def test_refresh_from_its_own_selection_reads_no_values_of_the_rest():
    policy = make_policy("recycled", k=8, stride=2, refresh="selection")
    full = make_policy("recycled", k=8, stride=2)
    assert run(policy).telemetry.kv_bytes_per_token()[2] < run(full).telemetry.kv_bytes_per_token()[2]
    assert isinstance(full.method, Recycling)
    assert dataclasses.replace(full.method, refresh="selection") == policy.method
