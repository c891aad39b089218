"""select_tokens on TPU: no sort over the tokens, only over the chosen where order is asked for."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ops.select_tokens.strengths import NO_TURN, candidates, strengths, turns, with_kept
from pallas_kernels.ops.select_tokens.tpu_compact import MAX_SLOTS, slots_of_bits
from pallas_kernels.ops.select_tokens.tpu_sort import weakest_first
from pallas_kernels.ops.select_tokens.tpu_threshold import chosen_bits


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
    del recall  # exact is fast enough
    tokens = scores.shape[-1]
    if tokens > MAX_SLOTS:
        raise NotImplementedError(f"scores has {tokens} tokens; the kernel has room for at most {MAX_SLOTS}")
    if pool == 1 and shared in (None, "union"):
        strength = scores.astype(jnp.float32)  # the kernel itself keeps to candidates
    else:
        candidate = candidates(lengths, tokens, sinks=sinks, recent=recent)
        strength = strengths(scores, candidate, pool=pool, shared=shared)
    m = min(k - sinks - recent, tokens)
    end = lengths.astype(jnp.int32) - recent
    chosen = _weakest_first(strength, sinks, end, m, ordered or shared == "union")
    if shared == "union":
        turn = turns(chosen[..., ::-1], tokens)
        # Every slot in a list is a candidate; if too few are, what fills up has no turn.
        chosen = _weakest_first(-turn, sinks, end, m, ordered)
        turn_of = jnp.take_along_axis(turn, jnp.maximum(chosen, 0), axis=-1)
        chosen = jnp.where(turn_of < NO_TURN, chosen, -1)
    return with_kept(chosen, lengths, k=k, sinks=sinks, recent=recent)


def _weakest_first(
    strength: Float[Array, "batch heads tokens"] | Int[Array, "batch heads tokens"],
    begin: int,
    end: Int[Array, " batch"],
    m: int,
    ordered: bool,
) -> Int[Array, "batch heads {m}"]:
    """The m strongest of slots begin..end-1, with -1 if there are fewer; in any order unless `ordered`."""
    batch, heads, tokens = strength.shape
    if 0 in (batch, heads, m):
        return jnp.zeros((batch, heads, m), jnp.int32)
    rows = strength.reshape(batch * heads, tokens)
    bits = chosen_bits(rows, begin, jnp.repeat(end, heads), m)
    slots = slots_of_bits(bits, m)
    if ordered:
        slots = weakest_first(rows, slots)
    return slots[: batch * heads].reshape(batch, heads, m)
