"""Attention of many queries at once, where each may read something else: what the prefill methods share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Grouped = Float[Array, "batch kv_heads group queries head_dim"]


def by_kv_head(q: Float[Array, "batch query_heads queries head_dim"], kv_heads: int) -> Grouped:
    """The query heads of each kv head together."""
    batch, _, queries, head_dim = q.shape
    return q.reshape(batch, kv_heads, -1, queries, head_dim)


def attend_blocks(
    q: Grouped,
    blocks: int | Int[Array, ""],
    read: Callable[
        [Int[Array, ""]],
        tuple[Grouped, Float[Array, "batch kv_heads block head_dim"], Float[Array, "batch kv_heads block head_dim"]],
    ],
    visible: Callable[[Int[Array, ""]], Bool[Array, "batch #kv_heads #group queries block"]],
) -> Grouped:
    """Softmax over blocks of slots that come one after the other, so that the matrix of logits never exists.

    `read` gives the queries as they see a block, its keys and its values; `visible` what each query may see of it. Over
    all blocks, every query must see something. Source: Milakov and Gimelshein, arXiv 1805.02867.
    """

    def visit(number, state):
        out, largest, total = state
        turned, k, v = read(number)
        logits = jnp.einsum("bngtd,bnud->bngtu", turned.astype(k.dtype), k, preferred_element_type=jnp.float32)
        logits = jnp.where(visible(number), logits * q.shape[-1] ** -0.5, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1, keepdims=True))
        weights, decay = jnp.exp(logits - new_largest), jnp.exp(largest - new_largest)
        gained = jnp.einsum("bngtu,bnud->bngtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out * decay + gained, new_largest, total * decay + jnp.sum(weights, axis=-1, keepdims=True)

    one_each = (*q.shape[:-1], 1)
    state = (
        jnp.zeros(q.shape, jnp.float32),
        # finite: of two infinities the difference is NaN
        jnp.full(one_each, jnp.finfo(jnp.float32).min),
        jnp.zeros(one_each, jnp.float32),
    )
    out, _, total = lax.fori_loop(0, blocks, visit, state)
    return (out / total).astype(q.dtype)


def attend_gathered(
    q: Grouped,
    k: Float[Array, "batch kv_heads entries head_dim"],
    v: Float[Array, "batch kv_heads entries head_dim"],
    visible: Bool[Array, "batch #kv_heads queries entries"],
) -> Grouped:
    """Softmax over a few keys and values that all queries share; every query must see something."""
    logits = jnp.einsum("bngtd,bnud->bngtu", q.astype(k.dtype), k, preferred_element_type=jnp.float32)
    logits = jnp.where(visible[:, :, None], logits * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bngtu,bnud->bngtd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


def gather_slots(
    stored: Float[Array, "batch kv_heads capacity head_dim"], slots: Int[Array, "batch #kv_heads entries"]
) -> Float[Array, "batch kv_heads entries head_dim"]:
    """The keys or values in those slots; what stands where a slot is negative is meaningless."""
    return jnp.take_along_axis(stored, jnp.maximum(slots, 0)[..., None], axis=2, mode="clip")
