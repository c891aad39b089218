"""select_tokens by rank: a slot's entry follows from how many candidates beat it, counted one against all."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def select_tokens(
    scores: Float[Array, "batch kv_heads tokens"],
    lengths: Int[Array, " batch"],
    *,
    k: int,
    pool: int,
    sinks: int,
) -> Int[Array, "batch kv_heads {k}"]:
    slots = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    # Rows along axis -2 ("this slot"), columns along axis -1 ("the other slot"). The matrices are tokens x
    # tokens: this is for checking, not for long caches.
    candidate = (slots[None, :] >= sinks) & (slots[None, :] < lengths[:, None] - 1)
    near = jnp.abs(slots[:, None] - slots[None, :]) <= pool // 2
    in_window = candidate[:, None, None, :] & near[None, None, :, :]
    pooled = jnp.max(jnp.where(in_window, scores[:, :, None, :], -jnp.inf), axis=-1)

    this, other = pooled[..., :, None], pooled[..., None, :]
    earlier = slots[None, None, None, :] < slots[None, None, :, None]
    beats = candidate[:, None, None, :] & ((other > this) | ((other == this) & earlier))
    rank = jnp.sum(beats, axis=-1)

    # Entry by entry, what stands there: the candidate of that rank, self, or a sink.
    last = (lengths[:, None].astype(jnp.int32) - 1) * jnp.ones_like(rank[..., 0])
    entries = []
    for entry in range(k - sinks - 1):
        here = candidate[:, None, :] & (rank == k - sinks - 2 - entry)
        entries.append(jnp.max(jnp.where(here, slots[None, None, :], -1), axis=-1))
    entries.append(jnp.where(last >= sinks, last, -1))
    entries += [jnp.where(sink <= last, sink, -1) for sink in range(sinks)]
    return jnp.stack(entries, axis=-1)
