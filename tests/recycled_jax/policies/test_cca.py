"""CCA-Attention: its three forms against the numpy oracle and each other, its partition of the past, full attention
where they coincide, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax import cca as module
from recycled_jax import rope
from recycled_jax.cca import CCA
from recycled_jax.decode import begin, decode_step, prefill
from recycled_jax.generate import generate, read
from recycled_jax.model import SequenceAttention, causal
from recycled_jax.policies import make_policy
from recycled_jax.policies.cca import cca
from tests.recycled_jax.policies.cca_numpy import NumpyCCA
from tests.recycled_jax.policies.numpy_llama import Layer, NumpyLlama, rotate
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

KNOBS = {"group": 4, "window": 6}
RAGGED = prompts(45, 8, 61)
NEW = 12


def run(policy, rows=RAGGED):
    model, params = tiny_model()
    return generate(model, params, rows, policy=policy, max_new_tokens=NEW, chunk=16, block=16)


@functools.partial(jax.jit, static_argnames="policy")
def step(state, token, active, *, policy):
    return decode_step(*tiny_model(), state, token, policy=policy, active=active)[:2]


def attend(rule: SequenceAttention, q, k, v, positions=None):
    """The training form, of arrays [heads, tokens, head_dim] before rotation."""
    positions = np.arange(q.shape[1]) if positions is None else positions
    angles = rope.angles(CONFIG, jnp.asarray(positions, jnp.int32)[None])
    return _attend(rule, module.MIN_BLOCK, *(jnp.asarray(x, jnp.float32)[None] for x in (q, k, v)), angles)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(rule: SequenceAttention, min_block: int, q, k, v, angles):
    return rule(q, k, v, angles)


def attend_in_numpy(rule: CCA, q, k, v):
    policy, layer, out = NumpyCCA(group=rule.group, window=rule.window), Layer(CONFIG, 0), []
    for token in range(q.shape[1]):
        layer.q.append(rotate(CONFIG, q[:, token], token))
        layer.bare_k.append(k[:, token])
        layer.k.append(rotate(CONFIG, k[:, token], token))
        layer.v.append(v[:, token])
        out.append(policy.prompt_attention(layer))
    return np.stack(out, axis=1)


def inputs(tokens: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    heads = (CONFIG.query_heads, CONFIG.kv_heads, CONFIG.kv_heads)
    return [rng.normal(size=(number, tokens, CONFIG.head_dim)) for number in heads]


# The longest prompt stays between 49 and 64 tokens: everything is padded to 64 and compiled once.
@settings(max_examples=3)
@given(lengths=st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(49, 64)), seed=st.integers(0, 9))
@pytest.mark.parametrize(("config", "knobs"), [(ONE_TO_ONE, KNOBS), (ALL_SHARE, {"group": 8, "window": 3})], ids=str)
def test_equals_numpy_on_ragged_batches(config, knobs, lengths, seed):
    assert_equals_oracle(cca(**knobs), lambda: NumpyCCA(**knobs), prompts(*lengths, seed=seed), NEW, config)


def test_prompts_are_read_and_cores_made_as_in_numpy():
    model, params = tiny_model()
    policy = cca(**KNOBS)
    prefilled = read(model, params, RAGGED, policies=[policy], max_new_tokens=NEW, chunk=16)
    cores = prefilled.prompts.seen(policy.prefill).cores
    for row, prompt in enumerate(RAGGED):
        numpy_policy = NumpyCCA(**KNOBS)
        oracle = NumpyLlama(CONFIG, params, numpy_policy)
        oracle.generate(prompt, 1)
        for layer in range(CONFIG.layers):
            ours = prefilled.cache.keys(layer)[row, :, : len(prompt)]
            np.testing.assert_allclose(ours, np.stack(oracle.layers[layer].k, axis=1), atol=1e-4)
            k, v = (np.stack(of_groups, axis=1) for of_groups in zip(*numpy_policy.cores[layer], strict=True))
            np.testing.assert_allclose(cores.keys(layer)[row, :, : k.shape[1]], k, atol=1e-4)
            np.testing.assert_allclose(cores.values(layer)[row, :, : v.shape[1]], v, atol=1e-4)


def test_training_prompts_and_decoding_are_one_attention():
    model, params = tiny_model()
    policy = cca(**KNOBS)
    tokens = np.array(prompts(61, 61, 61, seed=3), np.int32)
    whole = np.asarray(jax.jit(model.clone(attention=CCA(**KNOBS)).apply)(params, tokens))
    lengths = (45, 8, 21)
    rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    prefilled = read(model, params, rows, policies=[policy], max_new_tokens=16, chunk=16)
    active = jnp.ones(3, bool)
    logits, state = prefilled.prompts.logits, begin(policy, prefilled)
    for done in range(17):
        expected = np.stack([whole[row, length + done - 1] for row, length in enumerate(lengths)])
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        if done < 16:
            following = [tokens[row, length + done] for row, length in enumerate(lengths)]
            logits, state = step(state, jnp.array(following), active, policy=policy)
    dense = np.asarray(jax.jit(model.apply)(params, tokens))
    assert np.abs(whole - dense)[:, 20:].max(axis=-1).min() > 1e-2  # another attention than the full one


@pytest.mark.parametrize("min_block", [1, 128])
def test_training_form_equals_numpy_in_blocks_of_any_size(monkeypatch, min_block):
    monkeypatch.setattr(module, "MIN_BLOCK", min_block)
    arrays = inputs(45)
    for rule in (CCA(**KNOBS), CCA(group=7, window=1)):
        np.testing.assert_allclose(attend(rule, *arrays), attend_in_numpy(rule, *arrays), atol=1e-5)


def test_gradient_is_that_of_finite_differences_in_numpy(monkeypatch):
    monkeypatch.setattr(module, "MIN_BLOCK", 1)
    rule, arrays = CCA(**KNOBS), inputs(29)
    weight = np.random.default_rng(1).normal(size=arrays[0].shape)
    gradients = jax.grad(lambda *x: jnp.sum(attend(rule, *x) * weight), (0, 1, 2))(*map(jnp.float32, arrays))
    for place, gradient in enumerate(gradients):
        direction = np.random.default_rng(2 + place).normal(size=gradient.shape)

        def moved(by, place=place, direction=direction):
            shifted = [x + by * direction if number == place else x for number, x in enumerate(arrays)]
            return np.sum(attend_in_numpy(rule, *shifted) * weight)

        assert np.sum(gradient * direction) == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-4)


def test_memory_for_the_gradient_grows_with_the_tokens_and_not_with_their_square():
    def temporaries(tokens: int) -> int:
        q, k, v = (jnp.zeros((1, heads, tokens, 8)) for heads in (4, 2, 2))
        angles = rope.angles(CONFIG, jnp.arange(tokens)[None])
        gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(CCA(16, 64)(q, k, v, angles)), (0, 1, 2)))
        return gradient.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) <= 2 * temporaries(1024)


@settings(max_examples=30)
@given(group=st.integers(1, 9), window=st.integers(1, 12))
def test_every_token_of_the_past_is_seen_once(group, window):
    rule, tokens = CCA(group, window), 40
    lengths = np.arange(1, tokens + 1)
    visible = np.asarray(rule.visible(jnp.array(lengths), tokens, jnp.arange(tokens)[None, :]))
    cores, local = visible[:, :tokens].astype(int), visible[:, tokens:].astype(int)
    assert not cores[:, tokens // group :].any()
    stands_for = np.arange(tokens)[:, None] == np.arange(tokens)[None, :] // group
    np.testing.assert_array_equal(cores @ stands_for + local, np.tri(tokens))
    counts = local.sum(axis=1)
    assert (counts <= rule.longest).all() and (counts >= np.minimum(window, lengths)).all()


def test_the_oracle_covers_the_past_once():
    _, params = tiny_model()
    oracle = NumpyCCA(**KNOBS)
    NumpyLlama(CONFIG, params, oracle).generate(RAGGED[1], NEW)
    assert oracle.covered[0] == [[1] * length for length in range(1, len(RAGGED[1]) + NEW)]


def test_groups_of_one_are_full_attention():
    arrays = inputs(45)
    np.testing.assert_allclose(attend(CCA(1, 6), *arrays), attend(causal, *arrays), atol=1e-5)
    dense, ours = run(make_policy("full")), run(cca(group=1, window=6))
    assert ours.tokens == dense.tokens
    for these, those in zip(ours.log_probs, dense.log_probs, strict=True):
        np.testing.assert_allclose(these, those, atol=1e-4)
    # the identity would hold for a policy that ignored its knobs; this one would not
    assert run(cca(**KNOBS)).tokens != dense.tokens


def test_what_is_shorter_than_window_and_group_is_full_attention():
    rows = [RAGGED[0], RAGGED[1][:2], RAGGED[2]]
    dense, ours = (run(policy, rows) for policy in (make_policy("full"), cca(**KNOBS)))
    seen = 6 + 4 - 1
    assert ours.tokens[1][: seen - 1] == dense.tokens[1][: seen - 1]  # the first of them is told by two tokens
    np.testing.assert_allclose(ours.log_probs[1][: seen - 1], dense.log_probs[1][: seen - 1], atol=1e-5)
    assert abs(ours.log_probs[1][seen - 1] - dense.log_probs[1][seen - 1]) > 1e-4
    arrays = inputs(seen)
    np.testing.assert_array_equal(attend(CCA(**KNOBS), *arrays), attend(causal, *arrays))


def test_positions_count_and_not_places():
    """A rotation of everything changes nothing; a core turned to its place would be left behind."""
    rule, arrays = CCA(**KNOBS), inputs(45)
    positions, stays = np.arange(45), attend(rule, *arrays)
    np.testing.assert_allclose(attend(rule, *arrays, positions=100 + positions), stays, atol=1e-4)
    assert np.abs(attend(rule, *arrays, positions=3 * positions) - stays).max() > 1e-2


def test_a_row_does_not_depend_on_its_batch():
    together, alone = run(cca(**KNOBS)), run(cca(**KNOBS), RAGGED[:1])
    assert alone.tokens == together.tokens[:1]
    # One row is multiplied in parts, several rows are not: the sums differ in their last bits.
    np.testing.assert_allclose(alone.log_probs[0], together.log_probs[0], atol=1e-4)


def test_the_full_cache_is_not_read_and_can_be_dropped():
    with_cache, without = cca(**KNOBS), cca(**KNOBS, keep_cache=False)
    kept, dropped = run(with_cache), run(without)
    assert dropped.tokens == kept.tokens
    np.testing.assert_array_equal(dropped.telemetry.attended, kept.telemetry.attended)
    model, params = tiny_model()
    prefilled = read(model, params, RAGGED, policies=[without], max_new_tokens=NEW, chunk=16)
    state = begin(without, prefilled)
    assert state.cache is None
    assert state.kept.held.capacity == prefilled.cache.capacity // 4 + 6 + 4 - 1


def test_what_is_read_is_counted():
    telemetry = run(cca(**KNOBS)).telemetry
    for row, prompt in enumerate(RAGGED):
        for step in range(NEW - 1):
            length = len(prompt) + step + 1
            cores = (length - 6) // 4
            assert (telemetry.attended[step, :, row] == cores + length - 4 * cores).all()
            assert (telemetry.scored[step, :, row] == (8 if length % 4 == 0 else 0)).all()


def test_rows_that_have_stopped_keep_their_state():
    model, params = tiny_model()
    policy = cca(**KNOBS)
    state = begin(policy, read(model, params, RAGGED, policies=[policy], max_new_tokens=NEW, chunk=16))
    after = state
    for _ in range(4):  # in these, every row would complete a group
        _, after = step(after, jnp.zeros(3, jnp.int32), jnp.array([True, False, True]), policy=policy)
    before, now = (np.stack([state.kept.held.k, state.kept.held.v]) for state in (state, after))
    np.testing.assert_array_equal(before[:, :, 1], now[:, :, 1])
    changed = np.any(before[:, :, 0] != now[:, :, 0], axis=(0, 1, 2, 4))
    assert changed[: state.kept.cores].tolist() == [core == 45 // 4 for core in range(state.kept.cores)]
    assert changed[state.kept.cores :].sum() == 4


def test_half_precision():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, heads, 45, 8)), jnp.bfloat16) for heads in (4, 2, 2))
    angles = rope.angles(CONFIG, jnp.arange(45)[None])
    rule = jax.jit(CCA(**KNOBS))
    half, exact = rule(q, k, v, angles), rule(*(x.astype(jnp.float32) for x in (q, k, v)), angles)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(half), exact, atol=0.05)
    model, params = tiny_model(CONFIG, jnp.bfloat16)
    policy = cca(**KNOBS)

    def continued(tokens, lengths):
        state = prefill(model, params, tokens, lengths, policy=policy, capacity=64, chunk=16)[1]
        return decode_step(model, params, state, jnp.zeros(2, jnp.int32), policy=policy)[1].kept.held.k

    held = jax.eval_shape(continued, jnp.zeros((2, 48), jnp.int32), jnp.array([45, 8]))
    assert held.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"group": 0}, "group=0 must be at least 1 token"), ({"window": 0}, "window=0 must be at least 1 token")],
)
def test_knobs_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        cca(**knobs)


def test_prompts_have_to_be_read_by_whole_groups_and_by_cca_itself():
    model, params = tiny_model()
    with pytest.raises(ValueError, match="prompts are read 16 tokens at a time, expected a multiple of group=5"):
        run(cca(group=5))
    densely_read = read(model, params, RAGGED, max_new_tokens=NEW, chunk=16)
    with pytest.raises(ValueError, match="the prompts were read without CCAPrefill"):
        generate(model, params, densely_read, policy=cca(**KNOBS), max_new_tokens=NEW)
