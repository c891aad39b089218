"""verify_attention from the formula, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.checks import PER_QUERY_HEAD
from pallas_kernels.ops import oracle


def verify_attention(
    q: Float[Array, "batch query_heads steps head_dim"],
    cache: KVCache,
    start: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool,
    group_reduction: str,
) -> tuple[Float[Array, "batch query_heads steps head_dim"], Float[Array, "batch heads steps capacity"] | None]:
    own_slot = start[:, None] + jnp.arange(q.shape[2])[None, :]  # [batch, steps]
    visible = jnp.arange(cache.capacity)[None, None, :] <= own_slot[:, :, None]
    out, probabilities = oracle.attend(q, cache.keys(layer), cache.values(layer), visible[:, None], scale)
    if group_reduction != PER_QUERY_HEAD:
        by_group = probabilities.reshape(cache.batch, cache.kv_heads, -1, *probabilities.shape[2:])
        probabilities = getattr(jnp, group_reduction)(by_group, axis=2)
    return out.astype(q.dtype), probabilities if return_scores else None
