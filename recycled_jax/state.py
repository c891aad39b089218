"""What a decode step receives and returns: the full KV cache, the selection recycled from it, and when it was made."""

import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from recycled_jax.config import LlamaConfig


@struct.dataclass
class KVCache:
    """Keys (rotated to their positions) and values of every token so far. Slots from a row's length on are unwritten
    or stale and never read."""

    k: Float[Array, "layers batch kv_heads capacity head_dim"]
    v: Float[Array, "layers batch kv_heads capacity head_dim"]

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.k.shape[3]


@struct.dataclass
class Selection:
    """The slots that recycled steps read, copied once into a compact buffer.

    Entries stand in the order of eviction, weakest first; `positions` is -1 where an entry is empty, and empty ones
    come first. The newest token of every recycled step overwrites the next entry in that order.
    """

    positions: Int[Array, "layers batch kv_heads budget"]
    k: Float[Array, "layers batch kv_heads budget head_dim"]
    v: Float[Array, "layers batch kv_heads budget head_dim"]


@struct.dataclass
class RefreshMemory:
    """What schedules remember of each layer's last refresh."""

    query: Float[Array, "layers batch head_dim"]  # float32: mean over the heads of the query that made the selection
    steps_since: Int[Array, "layers batch"]  # recycled steps since then; 0 right after a refresh


@struct.dataclass
class DecodeState:
    """Everything that decoding carries from step to step; pass it donated, and never read the old one again.

    `lengths` counts the slots in use. `step` counts the decode steps since prefill, the steps in which at least one
    row was active. `selection` and `memory` are None for a policy that always reads everything.
    """

    cache: KVCache
    lengths: Int[Array, " batch"]
    step: Int[Array, ""]
    selection: Selection | None
    memory: RefreshMemory | None


def empty_cache(config: LlamaConfig, *, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
    """A cache of zeros with room for `capacity` tokens in each row."""
    shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def append_token(
    stack: Float[Array, "layers batch kv_heads slots head_dim"],
    layer: Int[Array, ""],
    slots: Int[Array, " batch"],
    token: Float[Array, "batch kv_heads head_dim"],
) -> Float[Array, "layers batch kv_heads slots head_dim"]:
    """`stack` with each row's `token` written to its slot of one layer; a slot past the end writes nothing."""
    rows = jnp.arange(token.shape[0])
    return stack.at[layer, rows, :, slots].set(token.astype(stack.dtype), mode="drop")
