"""gather_selection head by head: a row of the cache where there is a position, zeros where there is none."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gather_selection(
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    positions: Int[Array, "batch kv_heads budget"],
) -> tuple[Float[Array, "batch kv_heads budget head_dim"], Float[Array, "batch kv_heads budget head_dim"]]:
    def gather(
        cache: Float[Array, "batch kv_heads tokens head_dim"],
    ) -> Float[Array, "batch kv_heads budget head_dim"]:
        # One zero row behind the cache: position -1, counted from the end, is that row.
        extended = jnp.pad(cache, ((0, 0), (0, 0), (0, 1), (0, 0)))
        batch, kv_heads = positions.shape[:2]
        rows = [extended[row, head, positions[row, head]] for row in range(batch) for head in range(kv_heads)]
        return jnp.stack(rows).reshape(*positions.shape, cache.shape[-1])

    return gather(k), gather(v)
