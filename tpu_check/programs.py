"""What a program to be checked is, and the models and shapes they are checked at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import KVCache
from recycled_jax.config import LlamaConfig
from recycled_jax.planning.chips import Chip
from recycled_jax.presets import PRESETS

TOKENS = 131_072  # slots of the cache, all in use as far as floors are concerned
BUDGET = 4_096  # slots of a selection
PREFILL = 512  # tokens of a chunk of a prompt, the last one
STEPS = 9  # of which eight verify drafts and one comes after them
DTYPE = jnp.bfloat16

MODELS = {"8B": PRESETS["llama-3.1-8b"], "1B": PRESETS["llama-3.2-1b"]}

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
