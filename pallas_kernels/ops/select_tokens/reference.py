"""select_tokens by rank: a slot's entry follows from how many candidates beat it, counted one against all."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def select_tokens(
    scores: Float[Array, "batch kv_heads tokens"],
    lengths: Int[Array, " batch"],
    *,
    k: int,
    pool: int,
    sinks: int,
    recent: int,
    shared: str | None,
    ordered: bool,
    recall: float,
) -> Int[Array, "batch selections {k}"]:
    del ordered, recall  # always in order, always exact
    slots = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    lengths = lengths.astype(jnp.int32)
    # Rows along axis -2 ("this slot"), columns along axis -1 ("the other slot"). The matrices are tokens x
    # tokens: this is for checking, not for long caches.
    candidate = (slots[None, :] >= sinks) & (slots[None, :] < lengths[:, None] - recent)
    near = jnp.abs(slots[:, None] - slots[None, :]) <= pool // 2
    in_window = candidate[:, None, None, :] & near[None, None, :, :]
    strength = jnp.max(jnp.where(in_window, scores.astype(jnp.float32)[:, :, None, :], -jnp.inf), axis=-1)

    chosen = k - sinks - recent
    if shared == "max":
        strength = jnp.max(strength, axis=1, keepdims=True)
    if shared == "sum":
        largest = jnp.finfo(jnp.float32).max
        strength = jnp.clip(jnp.sum(strength, axis=1, keepdims=True), -largest, largest)
    rank = _ranks(strength, candidate)
    if shared == "union":
        # When a candidate's turn comes in each head's list, of which only the first `chosen` are taken.
        turn = rank * scores.shape[1] + jnp.arange(scores.shape[1])[None, :, None]
        first = jnp.min(jnp.where(rank < chosen, turn, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
        rank = _ranks(-first, candidate)

    # Entry by entry, what stands there: the candidate of that rank, a recent slot, or a sink.
    entries = []
    for entry in range(chosen):
        here = candidate[:, None, :] & (rank == chosen - 1 - entry)
        entries.append(jnp.max(jnp.where(here, slots[None, None, :], -1), axis=-1))
    length = jnp.broadcast_to(lengths[:, None], rank.shape[:2])
    for age in reversed(range(recent)):
        slot = length - 1 - age
        entries.append(jnp.where(slot >= sinks, slot, -1))
    entries += [jnp.where(sink < length, sink, -1) for sink in range(sinks)]
    return jnp.stack(entries, axis=-1)


def _ranks(
    strength: Float[Array, "batch heads tokens"] | Int[Array, "batch heads tokens"],
    candidate: Bool[Array, "batch tokens"],
) -> Int[Array, "batch heads tokens"]:
    """How many candidates beat each: they are stronger, or as strong and earlier."""
    slots = jnp.arange(strength.shape[-1])
    this, other = strength[..., :, None], strength[..., None, :]
    earlier = (slots[None, :] < slots[:, None])[None, None, :, :]
    beats = candidate[:, None, None, :] & ((other > this) | ((other == this) & earlier))
    return jnp.sum(beats, axis=-1, dtype=jnp.int32)
