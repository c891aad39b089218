"""select_tokens on TPU: no sort over the tokens, only over the chosen where order is asked for."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ops.select_tokens.strengths import total_strength, turns, with_kept
from pallas_kernels.ops.select_tokens.tpu_compact import MAX_SLOTS, slots_of_bits
from pallas_kernels.ops.select_tokens.tpu_pool import MAX_POOL, pooled
from pallas_kernels.ops.select_tokens.tpu_sort import weakest_first
from pallas_kernels.ops.select_tokens.tpu_threshold import chosen_bits

MAX_CHOSEN = MAX_SLOTS // 2  # with more, the sort would not fit the smaller chips' VMEM


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
    if pool > MAX_POOL:
        raise NotImplementedError(f"{pool=} is wider than the kernel's shifts reach; it takes at most {MAX_POOL} slots")
    m = min(k - sinks - recent, tokens)
    if m > MAX_CHOSEN:
        raise NotImplementedError(f"{k=} leaves {m} slots to choose; the kernel has room for at most {MAX_CHOSEN}")
    end = lengths.astype(jnp.int32) - recent
    # The kernels themselves keep to candidates, sinks..end-1: what the others hold does not matter.
    strength = scores.astype(jnp.float32)
    if shared == "max":
        strength = jnp.max(strength, axis=1, keepdims=True)  # before pooling, as maxima can be taken in any order
    if pool > 1 and strength.size:
        rows = strength.reshape(-1, tokens)
        strength = pooled(rows, sinks, jnp.repeat(end, strength.shape[1]), pool).reshape(strength.shape)
    if shared == "sum":
        strength = total_strength(strength)
    chosen = _weakest_first(strength, sinks, end, m, ordered or shared == "union")
    if shared == "union":
        # Of candidates that have no turn none is chosen: one list alone is as long as the selection.
        chosen = _weakest_first(-turns(chosen[..., ::-1], tokens), sinks, end, m, ordered)
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
