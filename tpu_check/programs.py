"""What a program to be checked is, and the models and shapes they are checked at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import KVCache
from recycled_jax.config import Llama3Rope, LlamaConfig
from tpu_check.chips import Chip

TOKENS = 131_072  # slots of the cache, all in use as far as floors are concerned
BUDGET = 4_096  # slots of a selection
PREFILL = 512  # tokens of a chunk of a prompt, the last one
DTYPE = jnp.bfloat16

_LLAMA_8B = LlamaConfig(
    vocab=128_256,
    embed=4096,
    mlp=14_336,
    layers=32,
    query_heads=32,
    kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
    rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192),
    max_length=TOKENS,
    eos_ids=(128_001, 128_008, 128_009),
)
_LLAMA_1B = replace(
    _LLAMA_8B,
    embed=2048,
    mlp=8192,
    layers=16,
    head_dim=64,
    rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192),
    tie_embeddings=True,
)
MODELS = {"8B": _LLAMA_8B, "1B": _LLAMA_1B}  # Llama-3.1-8B and Llama-3.2-1B

# ratio: static time over floor. select: static time over the floor of the decode attention that it is to spare.
# bundles_per_token: over the tokens fetched. temporaries: share of the cache. copies: number of cache-shaped copies.
# unaliased: share of the donated bytes that are not updated in place.
LimitName = Literal["ratio", "select", "bundles_per_token", "temporaries", "copies", "unaliased"]


@dataclass(frozen=True)
class Built:
    """A program ready to compile: `function(*arguments)`, the arguments abstract, `donate` their numbers.

    `floor_bytes` have to go between HBM and the device whatever the implementation does, `floor_operations` have to be
    computed. `cache` is the one whose copies count, if any. `tokens` are fetched one by one, `layers` compiled.
    `attention_bytes` are those of the decode attention that a selection is to spare.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    floor_bytes: int
    floor_operations: int = 0
    donate: tuple[int, ...] = ()
    cache: KVCache | None = None
    tokens: int | None = None
    attention_bytes: int | None = None
    layers: int | None = None


@dataclass(frozen=True)
class Program:
    """One row of the report for each chip. `short`: part of the short form."""

    operation: str
    model: str
    batch: int
    what: str  # what sets it apart from others of the same operation
    build: Callable[[Chip, LlamaConfig, int], Built]
    limits: Mapping[LimitName, float] = field(default_factory=dict)
    short: bool = False

    @property
    def name(self) -> str:
        parts = (self.operation, self.what, self.model, f"b{self.batch}")
        return "/".join(part.replace(" ", "_") for part in parts if part)


def array(shape: tuple[int, ...], dtype: Any = DTYPE) -> jax.ShapeDtypeStruct:
    """An array that is only a shape."""
    return jax.ShapeDtypeStruct(shape, dtype)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree of abstract arrays."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
