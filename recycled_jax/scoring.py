"""How probable a policy finds given text: decode steps whose next token is given, not sampled."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recycled_jax.decode import Params, begin, decode_step
from recycled_jax.frame import LayerTrace, Prefilled
from recycled_jax.model import Llama
from recycled_jax.policies import Policy
from recycled_jax.sharding import on_its_mesh


class Scored(NamedTuple):
    """`log_probs[b, i]` is that of token i of row b, given all before it, and `greedy[b, i]` whether greedy decoding
    would have taken it; `trace` is of the steps that read tokens 0, 1, … and gave both from the second one on."""

    log_probs: Float[Array, "batch tokens"]
    greedy: Bool[Array, "batch tokens"]
    trace: LayerTrace  # [tokens - 1, layers, batch]


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("model", "policy", "coverage", "implementation"))
def score_tokens(
    model: Llama,
    params: Params,
    prefilled: Prefilled,
    tokens: Int[Array, "batch tokens"],
    *,
    policy: Policy,
    coverage: bool = False,
    implementation: str | None = None,
) -> Scored:
    """Log-probabilities of `tokens` as continuations of the prompts, float32 (natural).

    The first token's come from the prompt, the others' from a decode step each under `policy`: the number is what the
    policy would have given them in generation. The cache needs a free slot for all tokens but the last of each row.
    Nothing is donated: other policies can go on from the same prompts. A policy that corrects the cache is refused
    (ValueError): corrections are the generation loop's.
    """
    if policy.correct_every is not None:
        every = policy.correct_every
        raise ValueError(f"policy {policy.name!r} corrects the cache every {every} steps; scoring does not")
    state = begin(policy, prefilled, implementation=implementation)

    def step(state, inputs):
        token, following = inputs
        logits, state, trace = decode_step(
            model, params, state, token, policy=policy, coverage=coverage, implementation=implementation
        )
        return state, (*_judge(logits, following), trace)

    by_step = tokens.T
    _, (log_probs, greedy, trace) = lax.scan(step, state, (by_step[:-1], by_step[1:]))
    first, first_greedy = _judge(prefilled.prompts.logits, by_step[0])
    return Scored(jnp.concatenate([first[None], log_probs]).T, jnp.concatenate([first_greedy[None], greedy]).T, trace)


def _judge(
    logits: Float[Array, "batch vocab"], token: Int[Array, " batch"]
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """The token's log-probability, and whether greedy decoding would have taken it."""
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    return log_prob, jnp.argmax(logits, axis=-1) == token
