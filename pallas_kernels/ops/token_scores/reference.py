"""token_scores from the formula, in float32: a softmax per query head, then the reduction."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.checks import PER_QUERY_HEAD

REDUCE = {
    "max": lambda members: jnp.max(jnp.stack(members), axis=0),
    "mean": lambda members: jnp.mean(jnp.stack(members), axis=0),
    "sum": lambda members: jnp.sum(jnp.stack(members), axis=0),
}


def token_scores(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    group_reduction: str,
) -> Float[Array, "batch heads capacity"]:
    k = cache.keys(layer)
    group = q.shape[1] // k.shape[1]
    visible = jnp.arange(k.shape[2])[None, :] < lengths[:, None]
    heads = []
    for head in range(k.shape[1]):
        probabilities = []
        for query_head in range(head * group, (head + 1) * group):
            products = q[:, query_head, None, :].astype(jnp.float32) * k[:, head].astype(jnp.float32)
            logits = jnp.where(visible, scale * jnp.sum(products, axis=-1), jnp.finfo(jnp.float32).min)
            probabilities.append(jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0.0))
        heads += probabilities if group_reduction == PER_QUERY_HEAD else [REDUCE[group_reduction](probabilities)]
    return jnp.stack(heads, axis=1)
