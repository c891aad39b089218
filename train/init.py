"""Initial parameters of a model trained from scratch, close to what retrieval needs.

Small models spend most of their training to find two things: heads that look back by a fixed offset, and heads that
match what stands before one token with what stands before another and copy what they find (induction heads, Olsson et
al. 2022, arXiv 2209.11895). Here they begin with rough ones, which training then sharpens or gives up (after the idea
of mimetic initialisation, Trockman and Kolter 2023, arXiv 2305.09828; the construction is ours):

- layer 0: query head h attends h + 1 tokens back and writes that token into a subspace of its own. With biases on q
  and k (Qwen2) that is a rotation between two bias vectors and needs no content;
- layers 1 and 2: each kv head compares two of these subspaces (`MATCHES`), in the channels that rotary embedding
  turns so slowly that distance does not matter;
- all later layers: `v_proj` then `o_proj` copy what is attended, so a head that finds a token votes for it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recycled_jax.config import LlamaConfig
from recycled_jax.rope import frequencies

OFFSET_PAIRS = 8  # fastest rotary pairs that mark an offset; the slow ones barely tell neighbours apart
OFFSET_SCALE = 6.3  # bias length per pair: a neighbouring offset's logit is then about 4 lower
OFFSET_GAIN = 0.05  # makes what layer 0 adds about as large as the embeddings
MATCH_SCALE = 1.5  # of q and k in a matching head
COPY_GAIN = 0.1  # of what a copying head adds
SLOW = 1e-3  # radians per token: slower rotary pairs serve matching
# Per layer from 1 on, per kv head: how many tokens back stands what the query holds against what the key holds. After
# "for KEY is " the value is 3 tokens behind a key that is 2 tokens behind the query; the others continue a value.
MATCHES = (((2, 3), (0, 1)), ((3, 4), (1, 2)))


def retrieval_init(config: LlamaConfig, params: Mapping[str, Any], key: jax.Array) -> dict:
    """`params` (fresh, plain) with the structure above put in.

    Raises ValueError for a model without biases on q and k, and for sizes that have no room for it.
    """
    if not config.qkv_bias:
        raise ValueError(
            f"init='retrieval' needs model_type='qwen2', whose q and k have biases, not {config.model_type!r}"
        )
    slow = [i for i, frequency in enumerate(frequencies(config)) if frequency < SLOW]
    channels = jnp.array([*slow, *(i + config.head_dim // 2 for i in slow)], jnp.int32)
    width, offsets = len(channels), config.query_heads
    if width == 0 or offsets * width > config.embed or config.kv_heads * config.head_dim > config.embed or offsets < 4:
        raise ValueError(
            f"init='retrieval' needs at least 4 query heads, slow rotary channels (there are {width}), and embed="
            f"{config.embed} of at least query_heads x those channels and kv_heads x head_dim"
        )
    if config.head_dim < 2 * OFFSET_PAIRS:
        raise ValueError(f"init='retrieval' needs head_dim={config.head_dim} to be at least {2 * OFFSET_PAIRS}")
    layers = dict(params["params"]["layers"])
    keys = jax.random.split(key, config.layers + 1)
    token = _orthonormal(keys[0], config.embed, width)
    # one block of directions per offset, all orthogonal: where layer 0 writes, and where the matching heads look
    written = _orthonormal(keys[-1], config.embed, offsets * width).reshape(config.embed, offsets, width)
    held = jnp.concatenate([token[:, None], written], axis=1)  # held[:, d]: the token d back

    for name, back in (("k_bias", jnp.zeros(config.kv_heads)), ("q_bias", 1.0 + jnp.arange(config.query_heads))):
        layers[name] = layers[name].at[0].set(jax.vmap(lambda offset: _offset_vector(config, offset))(back))
    layers["v_proj"] = layers["v_proj"].at[0].set(0.0).at[0, :, :, :width].set(token[:, None])
    layers["o_proj"] = layers["o_proj"].at[0].set(0.0).at[0, :, :width].set(OFFSET_GAIN * written.transpose(1, 2, 0))
    for layer in range(1, config.layers):
        basis = _orthonormal(keys[layer], config.embed, config.kv_heads * config.head_dim)
        basis = basis.reshape(config.embed, config.kv_heads, config.head_dim)
        copy_back = jnp.repeat(basis.transpose(1, 2, 0), config.group, axis=0)
        layers["v_proj"] = layers["v_proj"].at[layer].set(basis)
        layers["o_proj"] = layers["o_proj"].at[layer].set(COPY_GAIN * copy_back)
        for kv_head in range(config.kv_heads if layer <= len(MATCHES) else 0):
            query_back, key_back = MATCHES[layer - 1][kv_head % 2]
            heads = slice(kv_head * config.group, (kv_head + 1) * config.group)
            k_proj = layers["k_proj"][layer, :, kv_head].at[:, channels].set(MATCH_SCALE * held[:, key_back])
            q_proj = layers["q_proj"][layer, :, heads].at[:, :, channels].set(MATCH_SCALE * held[:, None, query_back])
            layers["k_proj"] = layers["k_proj"].at[layer, :, kv_head].set(k_proj)
            layers["q_proj"] = layers["q_proj"].at[layer, :, heads].set(q_proj)
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
