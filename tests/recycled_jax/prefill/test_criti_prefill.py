"""CritiPrefill against its numpy oracle, and its identities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import HeadMajor
from recycled_jax.frame import PromptChunk
from recycled_jax.policies import make_policy
from recycled_jax.prefill.criti_prefill import criti_prefill
from tests.recycled_jax.policies.numpy_llama import Full, best, softmax
from tests.recycled_jax.policies.refreshkv_numpy import NumpyRefreshKV
from tests.recycled_jax.prefill.agreement import assert_decodes_like_oracle, assert_equals_oracle, continued, read_by
from tests.recycled_jax.prefill.criti_prefill_numpy import NumpyCritiPrefill
from tests.recycled_jax.random_model import CONFIG, prompts

KNOBS = {"k": 8, "segment": 8, "block": 2, "threshold": 16, "fusion": 0.25}
RAGGED = prompts(61, 23, 48)


# The longest prompt stays between 49 and 64 tokens: everything is padded to 64 and compiled once.
@settings(max_examples=4)
@given(lengths=st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(49, 64)), seed=st.integers(0, 9))
@pytest.mark.parametrize(("kv_heads", "knobs"), [(4, KNOBS), (1, KNOBS | {"k": 6, "threshold": 0, "fusion": 0.5})])
def test_equals_numpy_on_ragged_batches(kv_heads, knobs, lengths, seed):
    config = dataclasses.replace(CONFIG, kv_heads=kv_heads)
    rows = prompts(*lengths, seed=seed)
    assert_equals_oracle(criti_prefill(**knobs), lambda: NumpyCritiPrefill(**knobs), rows, chunk=16, config=config)


def test_any_policy_decodes_from_it():
    recycled = make_policy("recycled", k=8, stride=4), lambda: NumpyRefreshKV(k=8, stride=4)
    assert_decodes_like_oracle(
        criti_prefill(**KNOBS),
        lambda: NumpyCritiPrefill(**KNOBS),
        RAGGED,
        chunk=16,
        policies=[(make_policy("full"), Full), recycled],
    )


@pytest.mark.parametrize("knobs", [{"k": 64, "threshold": 0}, {"k": 4, "threshold": 64}], ids=str)
def test_a_budget_or_a_threshold_above_the_prompt_is_dense(knobs):
    ours, dense = read_by(criti_prefill(**KNOBS | knobs), RAGGED, chunk=16), read_by(None, RAGGED, chunk=16)
    np.testing.assert_allclose(ours.prompts.logits, dense.prompts.logits, atol=1e-4)
    assert continued(ours).tokens == continued(dense).tokens
    # the identity would hold for a method that ignored its knobs; this one would not
    sparse = read_by(criti_prefill(**KNOBS), RAGGED, chunk=16)
    assert np.abs(sparse.prompts.logits - dense.prompts.logits).max() > 0.1


def test_a_row_does_not_depend_on_its_batch():
    together, alone = (read_by(criti_prefill(**KNOBS), rows, chunk=16) for rows in (RAGGED, RAGGED[1:2]))
    np.testing.assert_allclose(alone.prompts.logits[0], together.prompts.logits[1], atol=1e-5)


def made_up_prompt():
    """Queries, keys and values of the first 16 tokens of 24, in the cache, and the second half of them."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 4, 16, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 2, 16, 8)).astype(np.float32)

    def piece(first, layer):
        cut_q, cut_k, cut_v = (jnp.asarray(x[:, :, first : first + 8]) for x in (q, k, v))
        return PromptChunk(jnp.int32(layer), jnp.int32(first), jnp.array([24]), cut_q, cut_q, cut_k, cut_v)

    return q[0], k[0], v[0], piece


def bounds_of(method, piece, layer):
    """Of the keys of both halves."""
    bounds = method.start(CONFIG, batch=1, capacity=16, dtype=jnp.float32)
    return method.add_bounds(method.add_bounds(bounds, piece(0, layer)), piece(8, layer))


def test_segments_and_blocks_of_one_are_the_exact_top_k_of_the_group():
    q, k, v, piece = made_up_prompt()
    method = criti_prefill(k=3, segment=1, block=1, threshold=0, fusion=0.0)
    stack = (jnp.concatenate([jnp.asarray(x)[None, None]] * 2) for x in (k, v))  # two layers
    cache = HeadMajor(*stack)

    @jax.jit
    def attended():
        handed = method.before_layers(CONFIG, batch=1, capacity=16, chunk=8)
        return method.attend(bounds_of(method, piece, 1), handed, piece(8, 1), cache)[0]

    got = attended()[0]
    for t in range(8, 16):
        for head in range(2):
            logits = np.array([[k[head, u] @ q[h, t] for u in range(t)] for h in (2 * head, 2 * head + 1)])
            slots = [*best(list(logits.mean(axis=0)), 3), t]
            for h in (2 * head, 2 * head + 1):
                expected = softmax(k[head, slots] @ q[h, t] / np.sqrt(8)) @ v[head, slots]
                np.testing.assert_allclose(got[h, t - 8], expected, atol=1e-5)


def test_layers_are_fused_by_their_shares_and_without_fusion_independent():
    *_, piece = made_up_prompt()
    rng = np.random.default_rng(1)
    below, other = np.log(rng.dirichlet(np.ones(4), size=(2, 1, 2, 2))).astype(np.float32)
    below, other = (np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 4)), constant_values=-np.inf) for x in (below, other))

    def scores(below, *, fusion, layer=2):
        method = criti_prefill(k=4, segment=4, block=2, threshold=0, fusion=fusion)
        return np.exp(method.scores(piece(8, layer), bounds_of(method, piece, layer), jnp.asarray(below)))

    alone = scores(below, fusion=0.0)
    np.testing.assert_array_equal(alone, scores(other, fusion=0.0))
    np.testing.assert_allclose(scores(below, fusion=0.25), 0.25 * np.exp(below) + 0.75 * alone, rtol=1e-5)
    # the layer above the dense one begins anew
    np.testing.assert_array_equal(scores(below, fusion=0.25, layer=1), alone)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"segment": 0}, "segment=0 must be at least 1"),
        ({"block": 0}, "block=0 must be at least 1"),
        ({"segment": 100}, "segment=100 must be a multiple of block=32"),
        ({"k": 31}, "k=31 is below block=32"),
        ({"threshold": -1}, "threshold=-1 must be at least 0"),
        ({"fusion": 1.0}, "fusion=1.0 must be at least 0 and below 1"),
    ],
)
def test_knobs_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        criti_prefill(**knobs)


def test_prompts_have_to_be_read_by_whole_segments():
    with pytest.raises(ValueError, match="prompts are read 16 tokens at a time, expected a multiple of segment=512"):
        read_by(criti_prefill(), RAGGED, chunk=16)
