"""The verifying pass: the last few tokens of every row through the model at once, with full attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache, verify_attention
from recycled_jax import rope
from recycled_jax.decode import Params, write_rows
from recycled_jax.frame import Method
from recycled_jax.frame.verifying import Verified, wanted_scores
from recycled_jax.layers import through, weights_of
from recycled_jax.model import Llama, attention_inputs, attention_output, embed, logits, mlp


class Pass(NamedTuple):
    """What full attention makes of the tokens."""

    logits: Float[Array, "batch columns vocab"]  # after each of them
    cache: KVCache  # with their keys and values
    seen: Verified  # with all of them counted


def verify(
    model: Llama,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "batch columns"],
    first: Int[Array, " batch"],
    *,
    method: Method,
    implementation: str | None = None,
) -> Pass:
    """One pass over the cache for all `tokens`, which stand in every row from slot `first` on: what those slots hold is
    overwritten, and each token sees the slots before it and its own.

    Tokens that are padding (a draft that is shorter than others, an idle row) come after those that count and change
    nothing that is ever read. Beyond the end of the cache nothing is written. The scores that `method` wants, for all
    columns since nobody knows yet which will stand, are `columns` x capacity float32 per row, kv head and layer that
    selects.
    """
    config, weights = model.config, params["params"]
    columns = tokens.shape[1]
    angles = rope.angles(config, first[:, None] + jnp.arange(columns, dtype=jnp.int32)[None, :])
    reduction, scored = wanted_scores(method, config.layers)

    def layer_step(carry, layer, return_scores: bool):
        x, cache = carry
        w = weights_of(weights["layers"], layer)
        bare_q, k, v = attention_inputs(w, config, x)
        q, k = rope.rotate(bare_q, *angles), rope.rotate(k, *angles)
        cache = write_rows(cache, layer, first, k, v)
        k, v = cache.as_read(k, v)
        to_op = {"layer": layer, "group_reduction": reduction, "implementation": implementation}
        scores = None
        with jax.named_scope("attention/verify"):
            if return_scores:
                attended, scores = verify_attention(q, cache, first, return_scores=True, **to_op)
            else:
                attended = verify_attention(q, cache, first, **to_op)
        x = x + attention_output(w, attended)
        x = x + mlp(w, config, x)
        return (x, cache), ((bare_q, q, k, v), scores)

    carry = (embed(weights, tokens, model.dtype), cache)
    heads, scores = [], []
    for _, run in method.runs(config.layers):
        selects = run.start in scored  # layers of a run have one role
        carry, (of_run, scores_of_run) = through(
            lambda carry, layer, selects=selects: layer_step(carry, layer, selects), carry, run, weights["layers"]
        )
        heads.append(of_run)
        scores += [scores_of_run] if selects else []
    x, cache = carry
    stacks = jax.tree.map(lambda *of_runs: jnp.concatenate(of_runs), *heads)
    seen = Verified(first, jnp.full_like(first, columns), *stacks, scores=jnp.concatenate(scores) if scores else None)
    return Pass(logits(weights, config, x), cache, seen)
