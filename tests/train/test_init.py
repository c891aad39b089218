"""The structure that `retrieval_init` puts into fresh parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recycled_jax import rope
from recycled_jax.config import LlamaConfig
from recycled_jax.model import Llama, attention_inputs, embed
from train.init import COPY_GAIN, retrieval_init

CONFIG = LlamaConfig(
    model_type="qwen2", vocab=64, embed=64, mlp=32, layers=3, query_heads=4, kv_heads=2, head_dim=32, rope_theta=1e6
)
TOKENS = 48


@pytest.fixture(scope="module")
def plain():
    return jax.jit(Llama(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.fixture(scope="module")
def params(plain):
    return jax.jit(lambda key: retrieval_init(CONFIG, plain, key))(jax.random.key(1))["params"]


@pytest.mark.parametrize("start", [0, 5000])
def test_heads_of_the_first_layer_look_back_by_their_number(params, start):
    tokens = jax.random.randint(jax.random.key(2), (1, TOKENS), 0, CONFIG.vocab)
    first = jax.tree.map(lambda stacked: stacked[0], params["layers"])
    q, k, _ = attention_inputs(first, CONFIG, embed(params, tokens, jnp.float32))
    angles = rope.angles(CONFIG, start + jnp.arange(TOKENS)[None])
    q, k = np.asarray(rope.rotate(q, *angles))[0], np.asarray(rope.rotate(k, *angles))[0]
    for head in range(CONFIG.query_heads):
        scores = q[head] @ k[head // CONFIG.group].T / np.sqrt(CONFIG.head_dim)
        scores[np.triu_indices(TOKENS, 1)] = -np.inf
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        rows = np.arange(head + 1, TOKENS)
        assert (probabilities[rows].argmax(-1) == rows - (head + 1)).all()
        assert probabilities[rows, rows - (head + 1)].min() > 0.5


@pytest.mark.parametrize("layer", [1, 2])
def test_later_heads_copy_what_they_attend(params, layer):
    for head in range(CONFIG.query_heads):
        value = np.asarray(params["layers"]["v_proj"][layer, :, head // CONFIG.group])
        through = value @ np.asarray(params["layers"]["o_proj"][layer, head])
        np.testing.assert_allclose(through, through.T, atol=1e-6)
        eigenvalues = np.linalg.eigvalsh(through)
        # a projection times the gain: what is in the head's subspace comes back, nothing comes back turned round
        np.testing.assert_allclose(np.sort(eigenvalues)[-CONFIG.head_dim :], COPY_GAIN, atol=1e-5)
        np.testing.assert_allclose(np.sort(eigenvalues)[: -CONFIG.head_dim], 0, atol=1e-5)


def test_offset_heads_write_into_subspaces_of_their_own(params):
    written = np.asarray(params["layers"]["o_proj"][0])
    overlap = np.abs(np.einsum("hde,gfe->hgdf", written, written)).max((2, 3))
    assert (np.diag(overlap) > 1e-3).all()
    np.testing.assert_allclose(overlap - np.diag(np.diag(overlap)), 0, atol=1e-6)


def test_the_rest_is_untouched(plain, params):
    changed = {"q_proj", "k_proj", "v_proj", "o_proj", "q_bias", "k_bias"}
    for name, before in plain["params"]["layers"].items():
        assert np.array_equal(before, params["layers"][name]) == (name not in changed)
    assert np.array_equal(plain["params"]["embed_tokens"], params["embed_tokens"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "init='retrieval' needs model_type='qwen2'.*not 'llama'"),
        ({"embed": 48}, "init='retrieval' needs .* embed=48 of at least .* kv_heads x head_dim"),
        ({"query_heads": 2}, "init='retrieval' needs at least 4 query heads"),
        ({"rope_theta": 100.0}, "slow rotary channels .there are 0."),
        ({"head_dim": 8}, "init='retrieval' needs head_dim=8 to be at least 16"),
    ],
)
def test_models_that_cannot_have_it(change, message):
    with pytest.raises(ValueError, match=message):
        retrieval_init(dataclasses.replace(CONFIG, **change), {}, jax.random.key(0))
