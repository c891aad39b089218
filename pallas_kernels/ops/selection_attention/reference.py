"""selection_attention from the formula, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops import oracle


def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    selection: KVCache,
    valid: Bool[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
) -> Float[Array, "batch query_heads head_dim"]:
    visible = jnp.repeat(valid, q.shape[1] // valid.shape[1], axis=1)[:, :, None, :]
    out, _ = oracle.attend(q[:, :, None, :], selection.keys(layer), selection.values(layer), visible, scale)
    return out[:, :, 0, :].astype(q.dtype)
