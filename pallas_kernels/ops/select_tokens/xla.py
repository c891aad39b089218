"""select_tokens in XLA: a windowed maximum and one `top_k`; one more over the turns of a union."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.ops import on_divided
from pallas_kernels.ops.select_tokens.strengths import NO_TURN, candidates, strengths, turns, with_kept


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
    del ordered  # top_k sorts in any case
    tokens = scores.shape[-1]
    candidate = candidates(lengths, tokens, sinks=sinks, recent=recent)
    strength = strengths(scores, candidate, pool=pool, shared=shared)
    m = min(k - sinks - recent, tokens)
    chosen = _strongest_first(strength, m, recall)
    if shared == "union":
        soonest, slots = lax.top_k(-turns(chosen, tokens), m)
        chosen = jnp.where(soonest > -NO_TURN, slots, -1)
    return with_kept(chosen[..., ::-1], lengths, k=k, sinks=sinks, recent=recent)


def _strongest_first(
    strength: Float[Array, "batch heads tokens"], m: int, recall: float
) -> Int[Array, "batch heads {m}"]:
    """The m strongest, with -1 where strength is -inf."""
    # top_k orders -0.0 below 0.0; they are equal scores, so the sign is dropped.
    strength = jnp.where(strength == 0, 0.0, strength)
    if recall < 1 and m > 0:
        best, chosen = lax.approx_max_k(strength, m, recall_target=recall)
    else:
        best, chosen = (on_divided.top_k if on_divided.is_divided(strength) else lax.top_k)(strength, m)
    return jnp.where(best > -jnp.inf, chosen, -1)
