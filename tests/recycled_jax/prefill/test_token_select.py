"""TokenSelect's chunked prefill against its numpy oracle, and its identities."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import from_heads
from recycled_jax.frame import PromptChunk
from recycled_jax.policies import make_policy
from recycled_jax.prefill.token_select import token_select
from tests.recycled_jax.policies.numpy_llama import Full
from tests.recycled_jax.policies.refreshkv_numpy import NumpyRefreshKV
from tests.recycled_jax.prefill.agreement import assert_decodes_like_oracle, assert_equals_oracle, continued, read_by
from tests.recycled_jax.prefill.token_select_numpy import NumpyTokenSelect
from tests.recycled_jax.random_model import CONFIG, prompts

KNOBS = {"k": 20, "sinks": 2, "recent": 10, "pool": 1, "vote_scale": 1.0}
RAGGED = prompts(61, 23, 48)


# The longest prompt stays between 57 and 64 tokens: everything is padded to 64 and compiled once.
@settings(max_examples=4)
@given(lengths=st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(57, 64)), seed=st.integers(0, 9))
@pytest.mark.parametrize(
    ("kv_heads", "knobs"), [(4, KNOBS), (1, {"k": 14, "sinks": 0, "recent": 8, "pool": 3, "vote_scale": 0.4})]
)
def test_equals_numpy_on_ragged_batches(kv_heads, knobs, lengths, seed):
    config = dataclasses.replace(CONFIG, kv_heads=kv_heads)
    rows = prompts(*lengths, seed=seed)
    assert_equals_oracle(
        token_select(**knobs), lambda: NumpyTokenSelect(chunk=8, **knobs), rows, chunk=8, config=config
    )


def test_any_policy_decodes_from_it():
    recycled = make_policy("recycled", k=8, stride=4), lambda: NumpyRefreshKV(k=8, stride=4)
    assert_decodes_like_oracle(
        token_select(**KNOBS),
        lambda: NumpyTokenSelect(chunk=8, **KNOBS),
        RAGGED,
        chunk=8,
        policies=[(make_policy("full"), Full), recycled],
    )


def test_a_budget_above_the_prompt_is_dense():
    ours, dense = read_by(token_select(**KNOBS | {"k": 64}), RAGGED, chunk=8), read_by(None, RAGGED, chunk=8)
    np.testing.assert_allclose(ours.prompts.logits, dense.prompts.logits, atol=1e-4)
    assert continued(ours).tokens == continued(dense).tokens
    # the identity would hold for a method that ignored its knobs; this one would not
    sparse = read_by(token_select(**KNOBS), RAGGED, chunk=8)
    assert np.abs(sparse.prompts.logits - dense.prompts.logits).max() > 0.1


def test_a_row_does_not_depend_on_its_batch():
    together, alone = (read_by(token_select(**KNOBS), rows, chunk=8) for rows in (RAGGED, RAGGED[1:2]))
    np.testing.assert_allclose(alone.prompts.logits[0], together.prompts.logits[1], atol=1e-5)


def votes(order=(0, 1, 2, 3)):
    """Of heads that have a key head each, for a chunk of 8 after 16 slots, of which the last two are padding."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 4, 8, 8)).astype(np.float32)[:, list(order)]
    k, v = rng.normal(size=(2, 1, 4, 24, 8)).astype(np.float32)[:, :, list(order)]
    q, k, v = map(jnp.asarray, (q, k, v))
    chunk = PromptChunk(jnp.int32(0), jnp.int32(16), jnp.array([22]), q, q, k[:, :, 16:], v[:, :, 16:])
    return np.exp(token_select(**KNOBS).votes(chunk, from_heads("head_major", k, v))[0])


def test_every_head_has_one_vote_for_the_slots_between_sinks_and_recent():
    assert votes().sum() == pytest.approx(4, rel=1e-5)
    assert np.flatnonzero(votes()).tolist() == list(range(2, 12))


def test_the_order_of_heads_does_not_matter():
    np.testing.assert_allclose(votes(order=(2, 0, 3, 1)), votes(), rtol=1e-5)


def test_the_vote_of_one_head_goes_by_its_logits():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(4, 8, 8))[3], rng.normal(size=(2, 1, 4, 24, 8))[0, 0, 3]
    logits = k[2:12] @ q[:6].mean(axis=0)
    assert np.argsort(votes(order=(3,))[2:12]).tolist() == np.argsort(logits).tolist()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sinks": -1}, "sinks=-1 must be at least 0"),
        ({"recent": 0}, "recent=0 must be at least 1"),
        ({"k": 639}, r"k=639 is below sinks \+ recent = 640"),
        ({"pool": 4}, "pool=4 must be odd"),
        ({"vote_scale": 0.0}, "vote_scale=0.0 must be above 0"),
    ],
)
def test_knobs_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        token_select(**knobs)


def test_a_chunk_may_not_exceed_the_recent_window():
    with pytest.raises(ValueError, match="prompts are read 16 tokens at a time, expected at most recent=10"):
        read_by(token_select(**KNOBS), RAGGED, chunk=16)
