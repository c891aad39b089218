"""chunk_scores from the formula, in float32: one product per query head, then the reduction."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def chunk_scores(
    q: Float[Array, "batch query_heads head_dim"],
    chunks: Float[Array, "batch kv_heads chunks head_dim"],
    counts: Int[Array, " batch"],
    *,
    group_reduction: str,
    scale: float,
) -> Float[Array, "batch kv_heads chunks"]:
    group = q.shape[1] // chunks.shape[1]
    in_use = jnp.arange(chunks.shape[2])[None, :] < counts[:, None]
    reduce = {"max": jnp.max, "mean": jnp.mean, "sum": jnp.sum}[group_reduction]
    heads = []
    for head in range(chunks.shape[1]):
        logits = []
        for query_head in range(head * group, (head + 1) * group):
            products = q[:, query_head, None, :].astype(jnp.float32) * chunks[:, head].astype(jnp.float32)
            logits.append(scale * jnp.sum(products, axis=-1))
        heads.append(jnp.where(in_use, reduce(jnp.stack(logits), axis=0), -jnp.inf))
    return jnp.stack(heads, axis=1)
