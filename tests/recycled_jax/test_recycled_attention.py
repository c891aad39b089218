"""Recycled attention of whole sequences: against its mask in numpy, and against recycled decoding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import causal_attention
from recycled_jax.generate import read
from recycled_jax.model import Llama
from recycled_jax.policies import make_policy
from recycled_jax.recycled_attention import RecycledAttention
from recycled_jax.scoring import score_tokens
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model
from tests.recycled_jax.recycled_attention_numpy import allowed, attention, gradients

HEADS, HEAD_DIM = 4, 8


def inputs(tokens, kv_heads, seed, batch=2):
    """Queries, keys, values and a gradient of the output; sharp enough that tokens differ in score."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, heads, tokens, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    return [rng.normal(size=shape) * scale for shape, scale in zip(shapes, (2, 2, 1, 1), strict=True)]


def unrotated(tokens):
    return jnp.ones((1, tokens, HEAD_DIM // 2)), jnp.zeros((1, tokens, HEAD_DIM // 2))


def run(method, q, k, v, gradient):
    """The attention, and the gradients of q, k and v."""

    @jax.jit
    def value_and_gradients(q, k, v, gradient):
        out, back = jax.vjp(lambda *qkv: method(*qkv, unrotated(q.shape[2])), q, k, v)
        return out, *back(gradient)

    return [np.asarray(x) for x in value_and_gradients(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, gradient)))]


@pytest.mark.parametrize("kv_heads", [HEADS, 1], ids=["group 1", "group 4"])
@pytest.mark.parametrize("anchor", ["recycled", "own", "full"])
@pytest.mark.parametrize("evict", [False, True], ids=["", "evict"])
@settings(max_examples=2)
@given(
    prefix=st.sampled_from([1, 6, 23]),
    shape=st.sampled_from([(1, 5), (3, 4)]),
    k=st.sampled_from([5, 12]),
    pool=st.sampled_from([1, 3]),
    reduction=st.sampled_from(["max", "mean", "sum"]),
    seed=st.integers(0, 99),
)
def test_equals_the_mask(kv_heads, anchor, evict, prefix, shape, k, pool, reduction, seed):
    chunks, stride = shape
    method = RecycledAttention(k, stride, chunks, pool, reduction, anchor, evict)
    drawn = inputs(prefix + chunks * stride, kv_heads, seed)
    found = run(method, *drawn)
    for row in range(len(drawn[0])):
        q, keys, v, gradient = (x[row] for x in drawn)
        knobs = {"stride": stride, "chunks": chunks, "budget": k, "pool": pool, "anchor": anchor, "evict": evict}
        mask = allowed(q, keys, **knobs, reduce=getattr(np, reduction))
        expected = [attention(q, keys, v, mask), *gradients(q, keys, v, mask, gradient)]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[row], theirs, atol=2e-5)


@pytest.mark.parametrize("method", [RecycledAttention(40, 4, 3), RecycledAttention(8, chunks=0)], ids=str)
def test_a_budget_above_the_length_and_no_chunks_are_causal_attention(method):
    drawn = inputs(30, 2, seed=0)

    def causal(q, k, v, angles):
        return causal_attention(q, k, v)

    for ours, theirs in zip(run(method, *drawn), run(causal, *drawn), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_value_outside_of_selection_and_chunk_changes_nothing():
    q, k, v, gradient = inputs(30, 2, seed=3)
    method = RecycledAttention(6, 4, 1)
    before, *_, of_v = run(method, q, k, v, np.where(np.arange(30)[:, None] >= 26, gradient, 0))
    unseen = np.argwhere((of_v == 0).all(axis=-1))
    assert len(unseen) == 2 * 2 * (30 - 6 - 4)  # rows × kv heads × tokens
    for row, head, token in unseen:
        v[row, head, token] += 10
    after, *_ = run(method, q, k, v, gradient)
    np.testing.assert_array_equal(before[:, :, 26:], after[:, :, 26:])


@pytest.mark.parametrize("anchor", ["own", "full"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_the_model_gives_the_probabilities_of_decoding(anchor, chunks):
    """With eviction, token by token what the policy `recycled` gives; in three layers, batched, rotated."""
    stride, k, prefix = 5, 9, 24
    model, params = tiny_model()
    rows = prompts(prefix + chunks * stride, prefix + chunks * stride)
    method = RecycledAttention(k, stride, chunks, pool=3, anchor=anchor, evict=True)
    logits = jax.jit(Llama(CONFIG, attention=method).apply)(params, jnp.array(rows))
    expected = jax.nn.log_softmax(logits[:, prefix - 1 : -1])

    prefilled = read(model, params, [row[:prefix] for row in rows], max_new_tokens=chunks * stride, chunk=8)
    following = jnp.array([row[prefix:] for row in rows])
    policy = make_policy("recycled", k=k, stride=stride, pool=3, refresh={"own": "selection", "full": "full"}[anchor])
    scored = score_tokens(model, params, prefilled, following, policy=policy)
    expected = jnp.take_along_axis(expected, following[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scored.log_probs, expected, atol=1e-4)
    dense = score_tokens(model, params, prefilled, following, policy=make_policy("full"))
    assert np.abs(np.asarray(dense.log_probs) - np.asarray(expected)).max() > 0.01


def test_gradients_of_bfloat16_are_summed_over_chunks_in_float32():
    """Of a value that every chunk attends; its gradient is a sum of as many parts, all alike."""
    method, tokens = RecycledAttention(40, 2, 150, pool=1), 320
    drawn = inputs(tokens, 1, seed=0, batch=1)
    drawn[1][:, :, 0] = 4 * np.abs(drawn[1][:, :, 0])
    drawn[0], drawn[3] = np.abs(drawn[0]), np.full_like(drawn[3], 0.3)

    def of_values(dtype):
        q, k, v, gradient = (jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in drawn)
        back = jax.vjp(jax.jit(lambda v: method(q, k, v, unrotated(tokens))), v)[1]
        return np.asarray(back(gradient)[0], np.float32)[0, 0, 0]

    exact, found = of_values(jnp.float32), of_values(jnp.bfloat16)
    assert (exact > 300).all()  # above 256, bfloat16 knows even numbers only: a sum in it is 9 % off here
    np.testing.assert_allclose(found, exact, rtol=0.005)


def test_memory_grows_with_the_length_not_with_its_square():
    """Forward and backward, compiled, of chunks behind a short prefix (which is `causal_attention`'s affair)."""

    def compiled(tokens):
        method = RecycledAttention(64, 32, (tokens - 128) // 32)
        q, k = (jax.ShapeDtypeStruct((1, heads, tokens, 16), jnp.float32) for heads in (2, 1))
        angles = jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32)

        def loss(q, k, v, cosine, sine):
            return jnp.sum(method(q, k, v, (cosine, sine)) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, angles, angles).compile()

    short, long = compiled(1024), compiled(4096)
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"\w\d*\[([\d,]+)\]", long.as_text())
    ]
    assert max(sizes) < 4096 * 4096 / 8
    assert long.memory_analysis().temp_size_in_bytes < 5 * short.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"pool": 2}, "pool=2 must be odd"),
        ({"stride": 0}, "stride=0 must be at least 1 token"),
        ({"chunks": -1}, "chunks=-1 must be at least 0"),
        ({"anchor": "dense"}, "anchor='dense' must be one of recycled, own, full"),
        ({"k": 4, "stride": 5, "evict": True}, "stride=5 is above k=4"),
        ({"group_reduction": "median"}, "group_reduction='median' must be one of"),
    ],
    ids=str,
)
def test_refuses(knobs, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        RecycledAttention(**knobs)


def test_refuses_a_sequence_that_is_all_chunks():
    with pytest.raises(ValueError, match=r"a sequence of 12 tokens has no prefix before chunks=3 of stride=4; .* 13"):
        RecycledAttention(4, 4, 3).prefix(12)
