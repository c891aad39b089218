"""Choosing the next token from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Sampling:
    """Greedy at `temperature` 0; otherwise a draw at that temperature from the `top_k` likeliest tokens and from the
    fewest tokens whose probability reaches `top_p` (None: no limit)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


def sample(
    sampling: Sampling, logits: Float[Array, "batch vocab"], key: jax.Array
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """A token for every row and its log-probability under the model (before temperature and limits)."""
    with jax.named_scope("sample"):
        if sampling.temperature == 0:
            token = jnp.argmax(logits, axis=-1)
        else:
            keys = jax.random.split(key, logits.shape[0])
            token = jax.vmap(jax.random.categorical)(keys, limited(sampling, logits / sampling.temperature))
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def limited(sampling: Sampling, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    """`logits`, already divided by the temperature, with -inf for the tokens that are not drawn from."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = jnp.sort(logits, axis=-1)[:, ::-1]
        probability = jax.nn.softmax(order, axis=-1)
        # a token stays if the likelier ones have not reached top_p without it
        kept = jnp.cumsum(probability, axis=-1) - probability < sampling.top_p
        least = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
