"""What a decode step receives and returns: the full KV cache, and what the policy's method keeps beside it."""

from typing import Any, Literal, get_args

from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from pallas_kernels import Int8HeadMajor, KVCache, empty_cache, on_mesh, preferred_layout
from pallas_kernels.divided import parts
from recycled_jax.config import LlamaConfig

CacheDtype = Literal["int8"]  # None, where one may be given, is the dtype of computation


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
    config: LlamaConfig,
    *,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    implementation: str | None,
    cache_dtype: CacheDtype | None = None,
) -> KVCache:
    """A cache of zeros with room for `capacity` tokens in each row, in the layout that `implementation` reads, on the
    mesh in use if there is one. One of int8 is read in `dtype`.

    Raises ValueError for an unknown `cache_dtype`, and for int8 on a mesh that divides slots.
    """
    sizes = {"layers": config.layers, "batch": batch, "kv_heads": config.kv_heads, "capacity": capacity}
    sizes["head_dim"] = config.head_dim
    if cache_dtype is None:
        return on_mesh(empty_cache(preferred_layout(implementation), **sizes, dtype=dtype))
    if cache_dtype not in get_args(CacheDtype):
        raise ValueError(f"{cache_dtype=} is not known; expected None or one of: {', '.join(get_args(CacheDtype))}")
    if parts() > 1:
        raise ValueError(f"{cache_dtype=} is not for a mesh that divides the slots of a row; expected None")
    return on_mesh(Int8HeadMajor.empty(**sizes, dtype=dtype))
