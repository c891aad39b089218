"""gather_selection in XLA: one gather of rows for k and one for v."""

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
    k, v = gather_heads(cache.keys(layer), positions), gather_heads(cache.values(layer), positions)
    if rows is not None:
        keep = rows[:, None, None, None]
        k, v = jnp.where(keep, k, into.keys(layer)), jnp.where(keep, v, into.values(layer))
    return into.write(layer, 0, k, v)


def gather_heads(
    stored: Float[Array, "batch kv_heads capacity head_dim"], positions: Int[Array, "batch kv_heads budget"]
) -> Float[Array, "batch kv_heads budget head_dim"]:
    """The slots at `positions`, zeros where a position is -1."""
    # The default mode would compare every row with the bounds a second time, to write NaN where it lies outside.
    selected = jnp.take_along_axis(stored, jnp.maximum(positions, 0)[..., None], axis=2, mode="clip")
    return jnp.where((positions >= 0)[..., None], selected, jnp.zeros((), stored.dtype))
