"""prefill_attention from the formula, in float32, with the whole matrix of logits."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops import oracle


def prefill_attention(
    q: Float[Array, "batch query_heads chunk head_dim"],
    cache: KVCache,
    start: int | Int[Array, ""] | Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
) -> Float[Array, "batch query_heads chunk head_dim"]:
    own_slot = jnp.reshape(start, (-1, 1)) + jnp.arange(q.shape[2])[None, :]  # [batch or 1, chunk]
    visible = jnp.arange(cache.capacity)[None, None, :] <= own_slot[:, :, None]
    out, _ = oracle.attend(q, cache.keys(layer), cache.values(layer), visible[:, None], scale)
    return out.astype(q.dtype)
