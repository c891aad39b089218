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
    k, v = gather_positions(cache, layer, positions)
    if rows is not None:
        keep = rows[:, None, None, None]
        k, v = jnp.where(keep, k, into.keys(layer)), jnp.where(keep, v, into.values(layer))
    return into.write(layer, 0, k, v)


def gather_positions(
    cache: KVCache, layer: int | Int[Array, ""], positions: Int[Array, "batch kv_heads budget"]
) -> tuple[Float[Array, "batch kv_heads budget head_dim"], Float[Array, "batch kv_heads budget head_dim"]]:
    """The keys and values at `positions`, zeros where a position is -1."""
    there, nothing = (positions >= 0)[..., None], jnp.zeros((), cache.dtype)
    k, v = (jnp.where(there, x, nothing) for x in cache.gather(layer, jnp.maximum(positions, 0)))
    return k, v
