"""Softmax attention written out; the reference implementations differ only in the mask they give it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
    q: Float[Array, "batch query_heads queries head_dim"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    visible: Bool[Array, "#batch #query_heads #queries tokens"],
    scale: float,
) -> tuple[Float[Array, "batch query_heads queries head_dim"], Float[Array, "batch query_heads queries tokens"]]:
    """softmax(scale q k^T) v over the visible tokens, and the softmax, float32; zeros if none is visible."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    logits = scale * jnp.einsum("bhqd,bhtd->bhqt", q, k, precision="highest")
    # The lowest finite number rather than -inf: a query that sees nothing gets no NaN, and the outer `where`
    # zeros it.
    logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    probabilities = jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0.0)
    return jnp.einsum("bhqt,bhtd->bhqd", probabilities, v, precision="highest"), probabilities
