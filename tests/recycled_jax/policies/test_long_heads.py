"""LongHeads against its numpy oracle, its rules one by one, and full attention where they coincide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import from_heads
from recycled_jax.decode import begin, decode_step
from recycled_jax.frame import Here
from recycled_jax.generate import generate, read
from recycled_jax.policies import make_policy
from recycled_jax.policies.long_heads import ChunkChoice, attend_from, long_heads, summarise
from tests.recycled_jax.policies.long_heads_numpy import NumpyLongHeads
from tests.recycled_jax.policies.numpy_llama import NumpyLlama, rotate, softmax
from tests.recycled_jax.policies.record import assert_equals_oracle
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

KNOBS = {"k": 24, "chunk": 4}
RAGGED = prompts(45, 8, 61)
NEW = 12


def run(policy, rows=RAGGED):
    model, params = tiny_model()
    return generate(model, params, rows, policy=policy, max_new_tokens=NEW, chunk=16, block=16)


# The longest prompt stays between 49 and 64 tokens: everything is padded to 64 and compiled once.
@settings(max_examples=3)
@given(lengths=st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(49, 64)), seed=st.integers(0, 9))
@pytest.mark.parametrize(("kv_heads", "knobs"), [(4, KNOBS), (1, {"k": 12, "chunk": 4, "begin": 28})], ids=str)
def test_equals_numpy_on_ragged_batches(kv_heads, knobs, lengths, seed):
    config = dataclasses.replace(CONFIG, kv_heads=kv_heads)
    rows = prompts(*lengths, seed=seed)
    assert_equals_oracle(long_heads(**knobs), lambda: NumpyLongHeads(**knobs), rows, NEW, config)


def test_prompts_are_read_as_numpy_reads_them():
    model, params = tiny_model()
    prefilled = read(model, params, RAGGED, policies=[long_heads(**KNOBS)], max_new_tokens=NEW, chunk=16)
    for row, prompt in enumerate(RAGGED):
        oracle = NumpyLlama(CONFIG, params, NumpyLongHeads(**KNOBS))
        oracle.generate(prompt, 1)
        for layer in range(CONFIG.layers):
            ours = prefilled.cache.keys(layer)[row, :, : len(prompt)]
            np.testing.assert_allclose(ours, np.stack(oracle.layers[layer].k, axis=1), atol=1e-4)


@pytest.mark.parametrize("knobs", [{"k": 76}, {"k": 24, "begin": 76}], ids=str)
def test_attention_is_full_up_to_the_budget_and_up_to_begin(knobs):
    dense, ours = run(make_policy("full")), run(long_heads(chunk=4, **knobs))
    assert ours.tokens == dense.tokens
    for these, those in zip(ours.log_probs, dense.log_probs, strict=True):
        np.testing.assert_allclose(these, those, atol=1e-5)
    np.testing.assert_array_equal(ours.telemetry.attended, dense.telemetry.attended)
    # the identity would hold for a policy that ignored its budget; this one would not
    assert run(long_heads(**KNOBS)).tokens != dense.tokens


def test_a_row_does_not_depend_on_its_batch():
    together, alone = run(long_heads(**KNOBS)), run(long_heads(**KNOBS), RAGGED[:1])
    assert alone.tokens == together.tokens[:1]
    np.testing.assert_allclose(alone.log_probs[0], together.log_probs[0], atol=1e-5)


@settings(max_examples=25)
@given(st.data())
def test_what_is_chosen_and_from_where_it_is_seen(data):
    """The rules of the paper, for any scores: the first, the previous and the current chunk are in, the best of the
    others, `k` slots at most; seen at distances below `k`, in their order, and the nearest ones from where they are."""
    (width, places), chunks = data.draw(st.sampled_from([(1, 3), (3, 4), (4, 5)])), 8
    choice = ChunkChoice(k=places * width, chunk=width, begin=places * width)
    lengths = np.array([data.draw(st.lists(st.integers(1, chunks * width), min_size=2, max_size=2))])
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(1, 2, 2, chunks)).astype(np.float32)
    chosen = choice.choose(jnp.asarray(scores), jnp.asarray(lengths))
    standpoints = np.asarray(choice.standpoints(chosen, jnp.asarray(lengths)))
    for head in range(2):
        for query, length in enumerate(lengths[0]):
            current = (length - 1) // width
            mine = np.flatnonzero(chosen[0, head, query])
            assert len(mine) == min(places, current + 1)
            assert {0, max(current - 1, 0), current} <= set(mine) <= set(range(current + 1))
            others = [c for c in range(1, current - 1) if c not in mine]
            free = [c for c in mine if 0 < c < current - 1]
            row = scores[0, head, query]
            assert not others or not free or row[others].max() < row[free].min()

            here = standpoints[0, head, query]
            distances = [here[c] - slot for c in mine for slot in range(c * width, min((c + 1) * width, length))]
            # every slot that is read has a distance of its own, and none is left out
            assert distances == list(range(len(distances)))[::-1] and len(distances) <= places * width
            for near in {current, max(current - 1, 0)}:
                assert here[near] == length - 1


def test_turning_the_query_is_turning_the_keys():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, query_heads=2, kv_heads=1)
    bare_q, bare_k = rng.normal(size=(2, 8)), rng.normal(size=(24, 1, 8))
    v = rng.normal(size=(24, 1, 8))
    # chunks of 4: 0, 2, 4 and 5, the last with two tokens, next to each other at 0, 4, 8 and 12
    slots = [*range(4), *range(8, 12), *range(16, 20), 20, 21]
    moved = [rotate(config, bare_k[slot], position)[0] for position, slot in enumerate(slots)]
    q = rotate(config, bare_q, 13)
    expected = np.stack([softmax(np.stack(moved) @ q[head] / np.sqrt(8)) @ v[slots, 0] for head in range(2)])

    stored = np.stack([rotate(config, bare_k[slot], slot)[0] for slot in range(24)])
    cache = from_heads(
        "head_major", jnp.asarray(stored, jnp.float32)[None, None], jnp.asarray(v[:, 0][None, None], jnp.float32)
    )
    table = np.arange(24).reshape(6, 4)[[0, 2, 4, 5]]
    here = Here(jnp.int32(0), jnp.array([22]), jnp.int32(1), jnp.array([True]))
    got = attend_from(
        config,
        jnp.asarray(bare_q, jnp.float32)[None],
        cache,
        jnp.asarray(np.where(table < 22, table, -1))[None, None],
        jnp.array([[[0 + 13, 8 - 4 + 13, 16 - 8 + 13, 20 - 12 + 13]]]),
        here,
    )
    np.testing.assert_allclose(got[0], expected, atol=1e-5)


def summary(q, k, v, first):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    return summarise(CONFIG, q, k, v, jnp.array([first]))


def test_a_summary_lies_among_the_keys_of_its_chunk():
    rng = np.random.default_rng(0)
    q, bare_k, v = (rng.normal(size=(1, heads, 4, 8)) for heads in (4, 2, 2))
    k = np.stack([rotate(CONFIG, bare_k[0, :, u], 20 + u) for u in range(4)], axis=1)[None]
    got = summary(q, k, v, 20)
    for query_head in range(4):
        keys = np.stack([rotate(CONFIG, bare_k[0, :, u], u)[query_head // 2] for u in range(4)])
        # four points in eight dimensions: the weights that mix them are unique, and here they are a mean's
        weights, error, *_ = np.linalg.lstsq(
            np.vstack([keys.T, np.ones(4)]), np.append(got[0, query_head], 1.0), rcond=None
        )
        assert error < 1e-9 and weights.min() > 0


def test_the_summary_of_one_token_is_its_key_before_rotation():
    rng = np.random.default_rng(0)
    q, bare_k, v = (rng.normal(size=(1, heads, 1, 8)) for heads in (4, 2, 2))
    k = rotate(CONFIG, bare_k[0, :, 0], 9)[None, :, None]
    got = summary(q, k, v, 9)
    np.testing.assert_allclose(got[0], bare_k[0, [0, 0, 1, 1], 0], atol=1e-5)


def test_rows_that_have_stopped_keep_their_memory():
    model, params = tiny_model()
    policy = long_heads(**KNOBS)
    prefilled = read(model, params, RAGGED, policies=[policy], max_new_tokens=NEW, chunk=16)
    state = begin(policy, prefilled)
    step = jax.jit(
        lambda state, active: decode_step(model, params, state, jnp.zeros(3, int), policy=policy, active=active)
    )
    active = jnp.array([True, False, True])
    after = state
    for _ in range(4):  # at the fourth, a chunk of every row is complete
        _, after, _ = step(after, active)
    for before, now in zip(jax.tree.leaves(state.kept), jax.tree.leaves(after.kept), strict=True):
        np.testing.assert_array_equal(before[:, 1], now[:, 1])
        assert np.any(before[:, 0] != now[:, 0])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"k": 22, "chunk": 4}, "k=22 must be a multiple of chunk=4, at least 12"),
        ({"k": 8, "chunk": 4}, "k=8 must be a multiple of chunk=4, at least 12"),
        ({"k": 24, "chunk": 4, "begin": 30}, "begin=30 must be a multiple of chunk=4, at least k - chunk = 20"),
        ({"k": 24, "chunk": 4, "begin": 16}, "begin=16 must be a multiple of chunk=4, at least k - chunk = 20"),
    ],
)
def test_knobs_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        long_heads(**knobs)


def test_prompts_have_to_be_read_by_whole_chunks_and_by_long_heads_itself():
    model, params = tiny_model()
    with pytest.raises(ValueError, match="prompts are read 16 tokens at a time, expected a multiple of chunk=5"):
        run(long_heads(k=15, chunk=5))
    densely_read = read(model, params, RAGGED, max_new_tokens=NEW, chunk=16)
    with pytest.raises(ValueError, match="the prompts were read without LongHeadsPrefill"):
        generate(model, params, densely_read, policy=long_heads(**KNOBS), max_new_tokens=NEW)
