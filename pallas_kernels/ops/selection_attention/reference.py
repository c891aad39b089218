"""selection_attention from the formula, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.ops import oracle
from pallas_kernels.ops.one_query import reduce_group


def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    selection: KVCache,
    valid: Bool[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool,
    group_reduction: str,
) -> tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch score_heads budget"] | None]:
    visible = jnp.repeat(valid, q.shape[1] // valid.shape[1], axis=1)[:, :, None, :]
    out, probabilities = oracle.attend(q[:, :, None, :], selection.keys(layer), selection.values(layer), visible, scale)
    grouped = probabilities.reshape(q.shape[0], selection.kv_heads, -1, selection.capacity)
    scores = reduce_group(grouped, group_reduction) if return_scores else None
    return out[:, :, 0, :].astype(q.dtype), scores
