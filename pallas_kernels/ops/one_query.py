"""One query per head over keys and values: what attention over a cache and over a selection share in XLA."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.checks import PER_QUERY_HEAD
from pallas_kernels.dispatch import platform

# Queries of a kv head. With 36, of several steps, packing k pays: attention over 16,384 slots of 8 heads of 64 channels
# took 160 ms and with the keys first 269, with 8 queries 87 and 62 (two busy CPU cores, the best of 15).
KEYS_FIRST = 16


def products(
    q: Float[Array, "batch query_heads head_dim"], k: Float[Array, "batch kv_heads slots head_dim"], scale: float
) -> Float[Array, "batch kv_heads group slots"]:
    """scale q k, float32."""
    batch, kv_heads, _, head_dim = k.shape
    # q takes the dtype of k, never the reverse: casting k would write a copy of the cache.
    grouped = q.astype(k.dtype).reshape(batch, kv_heads, -1, head_dim)
    if platform() == "cpu" and grouped.shape[2] <= KEYS_FIRST:
        # Measured on two cores (group 1 to 7, 32,768 slots of 3 heads to 2,048 of 32): keys first reads k at 8 to 21
        # GB/s, queries first, which packs k, at 4 to 19, multiplying and reducing at 3.
        by_slot = jnp.einsum("bntd,bngd->bntg", k, grouped, preferred_element_type=jnp.float32)
        return scale * jnp.swapaxes(by_slot, 2, 3)
    return scale * jnp.einsum("bngd,bntd->bngt", grouped, k, preferred_element_type=jnp.float32)


def undivided_softmax(
    logits: Float[Array, "batch kv_heads group slots"],
    visible: Bool[Array, "batch #kv_heads slots"],
    parts: str | None = None,
) -> tuple[Float[Array, "batch kv_heads group slots"], Float[Array, "batch kv_heads group 1"]]:
    """Softmax before its division, float32: exp(logit - largest logit), 0 if not visible; and their sum.

    `parts` names the mesh axis that slots are divided over: then the largest and the sum are those of all parts.
    """
    logits = jnp.where(visible[:, :, None, :], logits, -jnp.inf)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    largest = largest if parts is None else lax.pmax(largest, parts)
    # The largest of nothing is -inf, and -inf - -inf would be NaN; exp(-inf - lowest finite) is 0.
    weights = jnp.exp(logits - jnp.maximum(largest, jnp.finfo(jnp.float32).min))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = total if parts is None else lax.psum(total, parts)
    # The largest weight is 1, so a sum below 1 is the 0 of a query that sees nothing: 0 / 1 gives its zeros.
    return weights, jnp.maximum(total, 1.0)


def softmax_weights(
    q: Float[Array, "batch query_heads head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    visible: Bool[Array, "batch #kv_heads slots"],
    scale: float,
    parts: str | None = None,
) -> tuple[Float[Array, "batch kv_heads group slots"], Float[Array, "batch kv_heads group 1"]]:
    """`undivided_softmax` of the `products`."""
    return undivided_softmax(products(q, k, scale), visible, parts)


def weighted_sums(
    weights: Float[Array, "batch kv_heads group slots"], v: Float[Array, "batch kv_heads slots head_dim"]
) -> Float[Array, "batch kv_heads group head_dim"]:
    """sum(weights v), float32. The weights are rounded to the dtype of v, which is read as stored."""
    return jnp.einsum("bngt,bntd->bngd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def weighted_values(
    weights: Float[Array, "batch kv_heads group slots"],
    total: Float[Array, "batch kv_heads group 1"],
    v: Float[Array, "batch kv_heads slots head_dim"],
    parts: str | None = None,
) -> Float[Array, "batch query_heads head_dim"]:
    """sum(weights v) / total, float32; the sum over all `parts`."""
    sums = weighted_sums(weights, v)
    sums = sums if parts is None else lax.psum(sums, parts)
    return (sums / total).reshape(v.shape[0], -1, v.shape[-1])


def reduce_group(
    probabilities: Float[Array, "batch kv_heads group slots"], group_reduction: str
) -> Float[Array, "batch heads slots"]:
    """Probabilities of a kv head's query heads as one score per slot: max, mean, sum; with "none", each has its own."""
    if group_reduction == PER_QUERY_HEAD:
        return probabilities.reshape(probabilities.shape[0], -1, probabilities.shape[-1])
    return getattr(jnp, group_reduction)(probabilities, axis=2)
