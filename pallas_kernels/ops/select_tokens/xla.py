"""select_tokens in XLA: a windowed maximum and one `top_k`."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def select_tokens(
    scores: Float[Array, "batch kv_heads tokens"],
    lengths: Int[Array, " batch"],
    *,
    k: int,
    pool: int,
    sinks: int,
) -> Int[Array, "batch kv_heads {k}"]:
    batch, kv_heads, tokens = scores.shape
    slots = jnp.arange(tokens)[None, None, :]
    last = lengths[:, None, None].astype(jnp.int32) - 1
    candidate = (slots >= sinks) & (slots < last)

    # -inf marks what is no candidate, before pooling so that nothing leaks in and after it so that nothing
    # leaks out. top_k orders -0.0 below 0.0; they are equal scores, so the sign is dropped.
    usable = jnp.where(candidate, jnp.where(scores == 0, 0.0, scores.astype(jnp.float32)), -jnp.inf)
    pooled = lax.reduce_window(usable, -jnp.inf, lax.max, (1, 1, pool), (1, 1, 1), "SAME")
    best, chosen = lax.top_k(jnp.where(candidate, pooled, -jnp.inf), min(k - sinks - 1, tokens))
    weakest_first = jnp.where(best > -jnp.inf, chosen, -1)[..., ::-1]

    missing = jnp.full((batch, kv_heads, k - sinks - 1 - weakest_first.shape[-1]), -1, jnp.int32)
    sink_slots = jnp.arange(sinks, dtype=jnp.int32)[None, None, :]
    itself = jnp.where(last >= sinks, last, -1)
    kept = jnp.concatenate([itself, jnp.where(sink_slots <= last, sink_slots, -1)], axis=-1)
    kept = jnp.broadcast_to(kept, (batch, kv_heads, 1 + sinks))
    return jnp.concatenate([missing, weakest_first, kept], axis=-1)
