"""prefill_attention in XLA: online softmax over blocks of the cache, as many as the chunk can see.

Source of the online softmax: Milakov and Gimelshein, arXiv 1805.02867.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache

# Slots per block. 512 keeps the logits of a 512-token chunk at 1 MiB per query head.
BLOCK_KV = 512

State = tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]


def prefill_attention(
    q: Float[Array, "batch query_heads chunk head_dim"],
    cache: KVCache,
    start: int | Int[Array, ""] | Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    first_slot: int | Int[Array, ""] = 0,
    parts: str | None = None,
) -> Float[Array, "batch query_heads chunk head_dim"]:
    """`cache` may be one of the `parts` of a mesh axis, whose slot 0 is `first_slot` of the whole."""
    batch, query_heads, chunk, head_dim = q.shape
    kv_heads, tokens = cache.kv_heads, cache.capacity
    group = query_heads // kv_heads
    block = min(BLOCK_KV, tokens)
    # The query heads of a kv head and the rows of the chunk form one axis: one matrix product per kv head.
    queries = q.astype(cache.dtype).reshape(batch, kv_heads, group * chunk, head_dim)
    starts = jnp.reshape(jnp.asarray(start, jnp.int32), (-1, 1)) - first_slot  # one for all rows, or one per row
    own_slot = jnp.tile(starts + jnp.arange(chunk)[None, :], (1, group))[:, :, None]

    def visit(index: Int[Array, ""], state: State) -> State:
        out, largest, total = state
        # A slice cannot run past the end, so the last block may begin inside its predecessor, whose slots are
        # then skipped.
        first = jnp.minimum(index * block, tokens - block)
        k_block, v_block = cache.block(layer, first, block)
        slots = (first + jnp.arange(block))[None, None, :]
        visible = (slots >= index * block) & (slots <= own_slot)
        logits = scale * jnp.einsum("bnqd,bntd->bnqt", queries, k_block, preferred_element_type=jnp.float32)
        logits = jnp.where(visible[:, None], logits, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - new_largest)
        decay = jnp.exp(largest - new_largest)
        out_block = jnp.einsum(
            "bnqt,bntd->bnqd", weights.astype(cache.dtype), v_block, preferred_element_type=jnp.float32
        )
        return (
            out * decay + out_block,
            new_largest,
            total * decay + jnp.sum(weights, axis=-1, keepdims=True),
        )

    # Slot 0 is in the first block and every query sees it: then `largest` is a logit and `total` positive.
    per_query = (batch, kv_heads, group * chunk)
    state = (
        jnp.zeros((*per_query, head_dim), jnp.float32),
        jnp.full((*per_query, 1), jnp.finfo(jnp.float32).min),
        jnp.zeros((*per_query, 1), jnp.float32),
    )
    blocks = (jnp.max(starts) + chunk + block - 1) // block
    out, largest, total = lax.fori_loop(0, jnp.minimum(blocks, -(-tokens // block)), visit, state)
    if parts is not None:
        decay = jnp.exp(largest - lax.pmax(largest, parts))
        out, total = lax.psum(out * decay, parts), lax.psum(total * decay, parts)
    return (out / total).astype(q.dtype).reshape(q.shape)
