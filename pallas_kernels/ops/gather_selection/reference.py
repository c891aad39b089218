"""gather_selection head by head: a row of the cache where there is a position, zeros where there is none."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cache import KVCache


def gather_selection(
    cache: KVCache,
    positions: Int[Array, "batch kv_heads budget"],
    into: KVCache,
    *,
    layer: int | Int[Array, ""],
    rows: Bool[Array, " batch"] | None,
) -> KVCache:
    def gather(
        stored: Float[Array, "batch kv_heads capacity head_dim"], old: Float[Array, "batch kv_heads budget head_dim"]
    ) -> Float[Array, "batch kv_heads budget head_dim"]:
        # One zero row behind the cache: position -1, counted from the end, is that row.
        extended = jnp.pad(stored, ((0, 0), (0, 0), (0, 1), (0, 0)))
        batch, kv_heads = positions.shape[:2]
        new = [extended[row, head, positions[row, head]] for row in range(batch) for head in range(kv_heads)]
        new = jnp.stack(new).reshape(old.shape)
        return new if rows is None else jnp.where(rows[:, None, None, None], new, old)

    k = gather(cache.keys(layer), into.keys(layer))
    v = gather(cache.values(layer), into.values(layer))
    return into.write(layer, 0, k, v)
