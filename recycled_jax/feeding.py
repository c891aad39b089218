"""Given tokens through decode steps: what follows a prompt is read over what the policy has kept of it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from recycled_jax.decode import Params, decode_step
from recycled_jax.model import Llama
from recycled_jax.policies import Policy
from recycled_jax.state import DecodeState


@functools.partial(jax.jit, static_argnames=("model", "policy", "implementation"), donate_argnames=("state",))
def feed(
    model: Llama,
    params: Params,
    state: DecodeState,
    tokens: Int[Array, "batch tokens"],
    counts: Int[Array, " batch"],
    *,
    policy: Policy,
    implementation: str | None = None,
) -> tuple[DecodeState, Float[Array, "batch vocab"]]:
    """The state after the first `counts[b]` (at least 1) of row b's `tokens`, and the logits after the last of them.

    Every token reads all that there is and selects anew, where the policy does so at some steps only; steps count from
    0 again afterwards. So a row does not depend on how many tokens others are given. Each row needs so many free slots.
    A policy that corrects the cache is refused (ValueError): corrections are the generation loop's.
    """
    if policy.correct_every is not None:
        every = policy.correct_every
        raise ValueError(f"policy {policy.name!r} corrects the cache every {every} steps; tokens cannot be fed to it")

    def step(carry, inputs):
        state, last = carry
        index, token = inputs
        logits, state, _ = decode_step(
            model,
            params,
            state,
            token,
            policy=policy,
            active=index < counts,
            kind="refresh",
            implementation=implementation,
        )
        return (state, jnp.where((index == counts - 1)[:, None], logits, last)), None

    nothing = jnp.zeros((len(counts), model.config.vocab), jnp.float32)
    (state, last), _ = lax.scan(step, (state, nothing), (jnp.arange(tokens.shape[1]), tokens.T))
    return DecodeState(state.cache, state.lengths, jnp.zeros_like(state.step), state.kept), last
