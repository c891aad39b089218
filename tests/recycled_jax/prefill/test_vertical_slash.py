"""MInference's vertical-slash pattern against its numpy oracle, and its identities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import from_heads
from recycled_jax.frame import PromptChunk
from recycled_jax.policies import make_policy
from recycled_jax.prefill.vertical_slash import heaviest, vertical_slash
from tests.recycled_jax.policies.numpy_llama import Full
from tests.recycled_jax.policies.refreshkv_numpy import NumpyRefreshKV
from tests.recycled_jax.prefill.agreement import assert_decodes_like_oracle, assert_equals_oracle, continued, read_by
from tests.recycled_jax.prefill.vertical_slash_numpy import NumpyVerticalSlash
from tests.recycled_jax.random_model import CONFIG, prompts

KNOBS = {"columns": 6, "slashes": 5, "window": 8, "sinks": 2, "recent": 3}
RAGGED = prompts(61, 23, 5)  # the last shorter than the window


# The longest prompt stays between 49 and 64 tokens: everything is padded to 64, one chunk or four, and compiled once.
@settings(max_examples=3)
@given(lengths=st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(49, 64)), seed=st.integers(0, 9))
@pytest.mark.parametrize(
    ("kv_heads", "knobs", "chunk"), [(4, KNOBS, 64), (1, KNOBS | {"columns": 3, "slashes": 2}, 64), (2, KNOBS, 16)]
)
def test_equals_numpy_on_ragged_batches(kv_heads, knobs, chunk, lengths, seed):
    config = dataclasses.replace(CONFIG, kv_heads=kv_heads)
    rows = prompts(*lengths, seed=seed)
    oracle = lambda: NumpyVerticalSlash(chunk=chunk, **knobs)  # noqa: E731
    assert_equals_oracle(vertical_slash(**knobs), oracle, rows, chunk=chunk, config=config)


def test_any_policy_decodes_from_it():
    recycled = make_policy("recycled", k=8, stride=4), lambda: NumpyRefreshKV(k=8, stride=4)
    assert_decodes_like_oracle(
        vertical_slash(**KNOBS),
        lambda: NumpyVerticalSlash(**KNOBS),
        RAGGED,
        chunk=64,
        policies=[(make_policy("full"), Full), recycled],
    )


@pytest.mark.parametrize("knobs", [{"columns": 61}, {"slashes": 61}], ids=str)
def test_as_many_columns_or_slashes_as_tokens_are_dense(knobs):
    ours, dense = read_by(vertical_slash(**KNOBS | knobs), RAGGED, chunk=64), read_by(None, RAGGED, chunk=64)
    np.testing.assert_allclose(ours.prompts.logits, dense.prompts.logits, atol=1e-4)
    assert continued(ours).tokens == continued(dense).tokens
    # the identity would hold for a method that ignored its knobs; this one would not
    sparse = read_by(vertical_slash(**KNOBS), RAGGED, chunk=64)
    assert np.abs(sparse.prompts.logits - dense.prompts.logits).max() > 0.1


def test_a_row_does_not_depend_on_its_batch():
    together, alone = (read_by(vertical_slash(**KNOBS), rows, chunk=64) for rows in (RAGGED, RAGGED[1:2]))
    np.testing.assert_allclose(alone.prompts.logits[0], together.prompts.logits[1], atol=1e-5)


def test_a_pattern_by_hand():
    # One head of one channel, 6 tokens; the last two ask, with q = 100: all their attention goes to the largest key
    # they can see, which stands in slot 1, 3 and 4 tokens before them.
    keys = jnp.array([0.0, 1, 0, 0, 0, 0])[None, None, :, None]
    cache = from_heads("head_major", keys, keys)
    q = jnp.array([0.0, 0, 0, 0, 100, 100])[None, None, :, None]
    chunk = PromptChunk(jnp.int32(0), jnp.int32(0), jnp.array([6]), q, q, keys, keys)
    columns, slashes = vertical_slash(columns=2, slashes=3, window=2, sinks=1, recent=1).pattern(chunk, cache)
    assert np.flatnonzero(columns[0, 0]).tolist() == [0, 1]
    assert np.flatnonzero(slashes[0, 0]).tolist() == [0, 3, 4]
    # With the largest key in slot 0, they find it at distances 4 and 5: as much at either, so that the nearer one wins.
    keys = keys[:, :, jnp.array([1, 0, 2, 3, 4, 5])]
    cache = from_heads("head_major", keys, keys)
    _, slashes = vertical_slash(columns=2, slashes=2, window=2, sinks=1, recent=1).pattern(chunk, cache)
    assert np.flatnonzero(slashes[0, 0]).tolist() == [0, 4]


def test_forced_places_count_and_the_nearest_stay():
    mass = jnp.array([0.0, 0.1, 0.2, 0.9, 0.3])[None, None]
    for count, first, expected in [(3, 2, [0, 1, 3]), (2, 3, [0, 1]), (2, 0, [3, 4]), (9, 1, [0, 1, 2, 3, 4])]:
        assert np.flatnonzero(heaviest(mass, count, first)[0, 0]).tolist() == expected


def test_blocks_of_queries_add_up(monkeypatch):
    method = vertical_slash(**KNOBS)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, heads, 40, 8)), jnp.float32) for heads in (4, 2, 2))
    chunk = PromptChunk(jnp.int32(0), jnp.int32(0), jnp.array([40, 17]), q, q, k, v)

    def attended(block):
        monkeypatch.setattr("recycled_jax.prefill.vertical_slash._BLOCK", block)
        return jax.jit(lambda: method.attend((), (), chunk, from_heads("head_major", k, v))[0])()

    whole, blocks = attended(64), attended(16)  # the last block of 16 is half padding
    np.testing.assert_allclose(blocks[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(blocks[1, :, :17], whole[1, :, :17], atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"slashes": 0}, "slashes=0 and recent=100 must be at least 1"),
        ({"recent": 0}, "slashes=6096 and recent=0 must be at least 1"),
        ({"columns": 29}, "sinks=30 must be between 0 and columns=29"),
        ({"sinks": -1}, "sinks=-1 must be between 0 and columns=1000"),
    ],
)
def test_knobs_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        vertical_slash(**knobs)
