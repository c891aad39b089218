"""decode_attention from the formula, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops import oracle
from pallas_kernels.ops.one_query import reduce_group


def decode_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool,
    group_reduction: str,
) -> tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch heads capacity"] | None]:
    batch, kv_heads, tokens = cache.batch, cache.kv_heads, cache.capacity
    visible = jnp.arange(tokens)[None, None, None, :] < lengths[:, None, None, None]
    out, probabilities = oracle.attend(q[:, :, None, :], cache.keys(layer), cache.values(layer), visible, scale)
    scores = reduce_group(probabilities.reshape(batch, kv_heads, -1, tokens), group_reduction)
    return out[:, :, 0, :].astype(q.dtype), scores if return_scores else None
