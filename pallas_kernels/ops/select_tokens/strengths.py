"""What the XLA and the Pallas implementation share: the strength of every slot, and where the entries stand."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

NO_TURN = jnp.iinfo(jnp.int32).max


def candidates(
    lengths: Int[Array, " batch"], tokens: int, *, sinks: int, recent: int
) -> Bool[Array, "batch 1 {tokens}"]:
    """Neither a sink, nor recent, nor padding."""
    slots = jnp.arange(tokens, dtype=jnp.int32)[None, None, :]
    return (slots >= sinks) & (slots < lengths[:, None, None].astype(jnp.int32) - recent)


def strengths(
    scores: Float[Array, "batch kv_heads tokens"],
    candidate: Bool[Array, "batch 1 tokens"],
    *,
    pool: int,
    shared: str | None,
) -> Float[Array, "batch selections tokens"]:
    """Pooled, and joined over heads by "max" or "sum"; -inf for what is no candidate, finite for candidates.

    For "union" they stay per head: its ranks need the heads' own selections first.
    """
    # -inf before pooling so that nothing leaks in, and after it so that nothing leaks out.
    usable = jnp.where(candidate, scores.astype(jnp.float32), -jnp.inf)
    if shared == "max":
        usable = jnp.max(usable, axis=1, keepdims=True)  # before pooling, as maxima can be taken in any order
    if pool > 1:
        usable = lax.reduce_window(usable, -jnp.inf, lax.max, (1, 1, pool), (1, 1, 1), "SAME")
    if shared == "sum":
        usable = total_strength(usable)
    return jnp.where(candidate, usable, -jnp.inf)


def total_strength(strength: Float[Array, "batch kv_heads tokens"]) -> Float[Array, "batch 1 tokens"]:
    """The sum over heads, held within the finite range, so that it is never taken for that of no candidate."""
    largest = jnp.finfo(jnp.float32).max
    return jnp.clip(jnp.sum(strength, axis=1, keepdims=True), -largest, largest)


def turns(chosen: Int[Array, "batch kv_heads m"], tokens: int) -> Int[Array, "batch 1 {tokens}"]:
    """When each slot's turn comes in the union of the heads' lists, `chosen`, strongest first with -1 for none.

    The turns go rank by rank and within a rank head by head; a slot in no list has `NO_TURN`.
    """
    batch, kv_heads, m = chosen.shape
    turn = jnp.arange(m)[None, :] * kv_heads + jnp.arange(kv_heads)[:, None]
    turn = jnp.broadcast_to(turn[None, :, :], chosen.shape).astype(jnp.int32)
    # An empty entry is sent out of bounds, where the scatter drops it: -1 would count from the end.
    slot = jnp.where(chosen < 0, tokens, chosen)
    row = jnp.arange(batch)[:, None, None]
    return jnp.full((batch, tokens), NO_TURN, jnp.int32).at[row, slot].min(turn, mode="drop")[:, None, :]


def with_kept(
    weakest_first: Int[Array, "batch selections m"],
    lengths: Int[Array, " batch"],
    *,
    k: int,
    sinks: int,
    recent: int,
) -> Int[Array, "batch selections {k}"]:
    """Missing entries before the candidates, behind them the recent window and the sinks."""
    batch, selections, m = weakest_first.shape
    missing = jnp.full((batch, selections, k - sinks - recent - m), -1, jnp.int32)
    length = lengths[:, None].astype(jnp.int32)
    newest = length - recent + jnp.arange(recent, dtype=jnp.int32)[None, :]
    sink_slots = jnp.arange(sinks, dtype=jnp.int32)[None, :]
    kept = jnp.concatenate(
        [jnp.where(newest >= sinks, newest, -1), jnp.where(sink_slots < length, sink_slots, -1)], axis=-1
    )
    kept = jnp.broadcast_to(kept[:, None, :], (batch, selections, recent + sinks))
    return jnp.concatenate([missing, weakest_first, kept], axis=-1)
