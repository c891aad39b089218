"""Initial parameters of a model trained from scratch, close to what retrieval needs.

Two pieces of structure that small models otherwise spend most of their training to find (after the idea of mimetic
initialisation, Trockman and Kolter 2023, arXiv 2305.09828; the offset heads are ours):

- layer 0's heads look back by fixed offsets 1, 2, 3, …: with biases on q and k (Qwen2) that is a rotation between
  the two bias vectors, and needs no content;
- in the other layers `v_proj` then `o_proj` copy what is attended, so a head that finds a token votes for it.
"""

import jax
import jax.numpy as jnp

from recycled_jax.config import LlamaConfig
from recycled_jax.rope import frequencies

OFFSET_PAIRS = 8  # fastest rotary pairs that mark an offset; the slow ones barely tell neighbours apart
OFFSET_SCALE = 6.3  # bias length per pair: a neighbouring offset's logit is then about 4 lower
OFFSET_GAIN = 0.1  # of what layer 0 adds
COPY_GAIN = 0.2  # of what a copying head adds


def retrieval_init(config: LlamaConfig, params: dict, key: jax.Array) -> dict:
    """`params` (fresh, plain) with the structure above put in.

    Raises ValueError for a model without biases on q and k, or with kv heads that together are wider than the model.
    """
    if not config.qkv_bias:
        raise ValueError(
            f"init='retrieval' needs model_type='qwen2', whose q and k have biases, not {config.model_type!r}"
        )
    if config.kv_heads * config.head_dim > config.embed:
        raise ValueError(
            f"init='retrieval' needs kv_heads x head_dim = {config.kv_heads * config.head_dim} within "
            f"embed={config.embed}"
        )
    layers = dict(params["params"]["layers"])
    keys = jax.random.split(key, config.layers)
    for layer in range(1, config.layers):
        basis = _orthonormal(keys[layer], config.embed, config.kv_heads * config.head_dim)
        basis = basis.reshape(config.embed, config.kv_heads, config.head_dim)
        copy_back = jnp.repeat(basis.transpose(1, 2, 0), config.group, axis=0)
        layers["v_proj"] = layers["v_proj"].at[layer].set(basis)
        layers["o_proj"] = layers["o_proj"].at[layer].set(COPY_GAIN * copy_back)
    for name, heads in (("k_bias", jnp.zeros(config.kv_heads)), ("q_bias", 1.0 + jnp.arange(config.query_heads))):
        layers[name] = layers[name].at[0].set(jax.vmap(lambda offset: _offset_vector(config, offset))(heads))
    # each offset head writes into directions of its own, or the next layer could not tell the offsets apart
    basis = _orthonormal(keys[0], config.embed, config.kv_heads * config.head_dim)
    layers["v_proj"] = layers["v_proj"].at[0].set(basis.reshape(config.embed, config.kv_heads, config.head_dim))
    for head, head_key in enumerate(jax.random.split(keys[0], config.query_heads)):
        directions = _orthonormal(head_key, config.embed, config.head_dim).T
        layers["o_proj"] = layers["o_proj"].at[0, head].set(OFFSET_GAIN * directions)
    return {"params": {**params["params"], "layers": layers}}


def _offset_vector(config: LlamaConfig, offset: jax.Array) -> jax.Array:
    """A bias whose rotary product with that of offset 0 peaks where the key stands `offset` tokens back."""
    angle = -offset * jnp.asarray(frequencies(config)[:OFFSET_PAIRS])
    half = config.head_dim // 2
    vector = jnp.zeros(config.head_dim)
    vector = vector.at[:OFFSET_PAIRS].set(OFFSET_SCALE * jnp.cos(angle))
    return vector.at[half : half + OFFSET_PAIRS].set(OFFSET_SCALE * jnp.sin(angle))


def _orthonormal(key: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.linalg.qr(jax.random.normal(key, (rows, columns)))[0]
