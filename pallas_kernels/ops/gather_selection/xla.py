"""gather_selection in XLA: one gather of rows for k and one for v."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gather_selection(
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    positions: Int[Array, "batch kv_heads budget"],
) -> tuple[Float[Array, "batch kv_heads budget head_dim"], Float[Array, "batch kv_heads budget head_dim"]]:
    filled = (positions >= 0)[..., None]
    rows = jnp.maximum(positions, 0)[..., None]

    def gather(
        cache: Float[Array, "batch kv_heads tokens head_dim"],
    ) -> Float[Array, "batch kv_heads budget head_dim"]:
        # The default mode would compare every row with the bounds a second time, to write NaN where it lies
        # outside.
        selected = jnp.take_along_axis(cache, rows, axis=2, mode="clip")
        return jnp.where(filled, selected, jnp.zeros((), cache.dtype))

    return gather(k), gather(v)
