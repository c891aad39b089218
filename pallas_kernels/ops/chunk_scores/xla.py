"""chunk_scores in XLA: one batched product over the vectors as they lie."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ops.one_query import reduce_group


def chunk_scores(
    q: Float[Array, "batch query_heads head_dim"],
    chunks: Float[Array, "batch kv_heads chunks head_dim"],
    counts: Int[Array, " batch"],
    *,
    group_reduction: str,
    scale: float,
) -> Float[Array, "batch kv_heads chunks"]:
    batch, kv_heads, count, head_dim = chunks.shape
    # q takes the dtype of the vectors, never the reverse: casting them would write a copy.
    grouped = q.astype(chunks.dtype).reshape(batch, kv_heads, -1, head_dim)
    logits = scale * jnp.einsum("bngd,bncd->bngc", grouped, chunks, preferred_element_type=jnp.float32)
    in_use = jnp.arange(count)[None, :] < counts[:, None]
    return jnp.where(in_use[:, None, :], reduce_group(logits, group_reduction), -jnp.inf)
