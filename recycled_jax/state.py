"""What a decode step receives and returns: the full KV cache, the selection recycled from it, and when it was made."""

from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache, empty_cache, preferred_layout
from recycled_jax.config import LlamaConfig


@struct.dataclass
class Selection:
    """The slots that recycled steps read, copied once into a compact buffer.

    Entries stand in the order of eviction, weakest first; `positions` is -1 where an entry is empty, and empty ones
    come first. The newest token of every recycled step overwrites the next entry in that order.
    """

    positions: Int[Array, "layers batch kv_heads budget"]
    compact: KVCache  # its slots are the entries


@struct.dataclass
class RefreshMemory:
    """What schedules remember of each layer's last refresh."""

    query: Float[Array, "layers batch head_dim"]  # float32: mean over the heads of the query that made the selection
    steps_since: Int[Array, "layers batch"]  # recycled steps since then; 0 right after a refresh


@struct.dataclass
class DecodeState:
    """Everything that decoding carries from step to step; pass it donated, and never read the old one again.

    `cache` holds keys (rotated to their positions) and values of every token so far; slots from a row's length on are
    unwritten or stale and never read. `lengths` counts the slots in use. `step` counts the decode steps since prefill,
    the steps in which at least one row was active. `selection` and `memory` are None for a policy that always reads
    everything.
    """

    cache: KVCache
    lengths: Int[Array, " batch"]
    step: Int[Array, ""]
    selection: Selection | None
    memory: RefreshMemory | None


def model_cache(
    config: LlamaConfig, *, batch: int, capacity: int, dtype: DTypeLike, implementation: str | None
) -> KVCache:
    """A cache of zeros with room for `capacity` tokens in each row, in the layout that `implementation` reads."""
    return empty_cache(
        preferred_layout(implementation),
        layers=config.layers,
        batch=batch,
        kv_heads=config.kv_heads,
        capacity=capacity,
        head_dim=config.head_dim,
        dtype=dtype,
    )
