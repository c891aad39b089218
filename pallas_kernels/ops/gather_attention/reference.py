"""gather_attention without a gather: a slot named n times counts n times in a softmax over the cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache


def gather_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    positions: Int[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
) -> Float[Array, "batch query_heads head_dim"]:
    k, v = cache.keys(layer), cache.values(layer)
    group = q.shape[1] // k.shape[1]
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    slots = jnp.arange(k.shape[2])[None, None, None, :]
    times = jnp.sum(positions[..., None] == slots, axis=2, dtype=jnp.float32)
    times = jnp.repeat(times, q.shape[1] // positions.shape[1], axis=1)
    logits = scale * jnp.einsum("bhd,bhtd->bht", q32, jnp.repeat(k32, group, axis=1), precision="highest")
    logits = jnp.where(times > 0, logits, jnp.finfo(jnp.float32).min)
    weights = times * jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bht,bhtd->bhd", weights, jnp.repeat(v32, group, axis=1), precision="highest")
    return (out / jnp.where(total > 0, total, 1.0)).astype(q.dtype)
