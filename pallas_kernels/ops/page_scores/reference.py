"""page_scores from the formula, in float32: the larger of two products, channel by channel."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache


def page_scores(
    q: Float[Array, "batch query_heads head_dim"],
    bounds: KVCache,
    lengths: Int[Array, " batch"],
    *,
    page_size: int,
    layer: int | Int[Array, ""],
    group_reduction: str,
    scale: float,
) -> Float[Array, "batch kv_heads pages"]:
    minima, maxima = bounds.keys(layer).astype(jnp.float32), bounds.values(layer).astype(jnp.float32)
    group = q.shape[1] // bounds.kv_heads
    first_tokens = page_size * jnp.arange(bounds.capacity)
    in_use = first_tokens[None, :] < lengths[:, None]
    reduce = {"max": jnp.max, "mean": jnp.mean, "sum": jnp.sum}[group_reduction]
    heads = []
    for head in range(bounds.kv_heads):
        logits = []
        for query_head in range(head * group, (head + 1) * group):
            query = q[:, query_head, None, :].astype(jnp.float32)
            largest = jnp.maximum(query * minima[:, head], query * maxima[:, head])
            logits.append(scale * jnp.sum(largest, axis=-1))
        heads.append(jnp.where(in_use, reduce(jnp.stack(logits), axis=0), -jnp.inf))
    return jnp.stack(heads, axis=1)
