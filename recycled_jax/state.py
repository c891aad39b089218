"""What a decode step receives and returns: the full KV cache, and what the policy's method keeps beside it."""

from typing import Any

from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from pallas_kernels import KVCache, empty_cache, preferred_layout
from recycled_jax.config import LlamaConfig


@struct.dataclass
class DecodeState:
    """Everything that decoding carries from step to step; pass it donated, and never read the old one again.

    `cache` holds keys (rotated to their positions) and values of every token so far; slots from a row's length on are
    unwritten or stale and never read. It is None for a method that has evicted all it does not keep itself. `lengths`
    counts the slots in use. `step` counts the decode steps since prefill, the steps in which at least one row was
    active. `kept` is the method's own: `RecyclingState` for instance, or nothing.
    """

    cache: KVCache | None
    lengths: Int[Array, " batch"]
    step: Int[Array, ""]
    kept: Any


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
