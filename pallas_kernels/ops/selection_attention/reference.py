"""selection_attention from the formula, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.ops import oracle


def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    k_sel: Float[Array, "batch kv_heads budget head_dim"],
    v_sel: Float[Array, "batch kv_heads budget head_dim"],
    valid: Bool[Array, "batch kv_heads budget"],
    *,
    scale: float,
) -> Float[Array, "batch query_heads head_dim"]:
    visible = jnp.repeat(valid, q.shape[1] // k_sel.shape[1], axis=1)[:, :, None, :]
    out, _ = oracle.attend(q[:, :, None, :], k_sel, v_sel, visible, scale)
    return out[:, :, 0, :].astype(q.dtype)
