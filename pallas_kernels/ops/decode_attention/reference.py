"""decode_attention from the formula, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ops import oracle


def decode_attention(
    q: Float[Array, "batch query_heads head_dim"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    lengths: Int[Array, " batch"],
    *,
    scale: float,
    return_scores: bool,
    group_reduction: str,
) -> tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch kv_heads tokens"] | None]:
    batch, kv_heads, tokens, _ = k.shape
    visible = jnp.arange(tokens)[None, None, None, :] < lengths[:, None, None, None]
    out, probabilities = oracle.attend(q[:, :, None, :], k, v, visible, scale)
    scores = getattr(probabilities.reshape(batch, kv_heads, -1, tokens), group_reduction)(axis=2)
    return out[:, :, 0, :].astype(q.dtype), scores if return_scores else None
