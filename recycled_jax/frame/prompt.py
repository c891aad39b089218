"""What is made of prompts: the cache, and what policies asked to see while they were read.

An `Observer` gets every chunk of the prompt in every layer and keeps what a method's `begin` needs and the cache does
not tell. A `PrefillAttention` is how prompts attend.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache, from_heads, prefill_attention
from recycled_jax.config import LlamaConfig


@dataclass(frozen=True)
class PromptChunk:
    """A piece of the prompts in one layer: slots `start` to `start + chunk - 1` of every row. Not a pytree.

    `start` differs from row to row only where prompts of several lengths are extended (`PrefillAttention.extends`);
    observers never see that. `lengths` are those of the whole prompts: of a row, the chunk may hold padding, or nothing
    else. `bare_q` is `q` before rotation.
    """

    layer: Int[Array, ""] | int
    start: Int[Array, ""] | Int[Array, " batch"]
    lengths: Int[Array, " batch"]
    bare_q: Float[Array, "batch query_heads chunk head_dim"]
    q: Float[Array, "batch query_heads chunk head_dim"]
    k: Float[Array, "batch kv_heads chunk head_dim"]
    v: Float[Array, "batch kv_heads chunk head_dim"]
    implementation: str | None = None


class Observer(ABC):
    """Implementations are frozen dataclasses: equal ones see the same, and are asked once."""

    @abstractmethod
    def start(self, config: LlamaConfig, *, batch: int, capacity: int, dtype: DTypeLike) -> Any:
        """What is kept before the first chunk: a pytree whose arrays begin with the axes of layers and rows. With more
        `capacity`, arrays may be longer: what they held comes first."""

    @abstractmethod
    def observe(self, seen: Any, chunk: PromptChunk, cache: KVCache) -> Any:
        """What is kept after a chunk, whose keys and values stand in the cache already; layers come bottom up. Where a
        chunk begins must not matter; rows and layers do not see each other."""

    def resume(self, seen: Any, added: Int[Array, " batch"]) -> Any:
        """What is kept of prompts to which so many tokens are about to be added: what it would be if chunks had been
        read, up to there, of the longer prompts. Sums over the tokens, the default, stay as they are."""
        del added
        return seen


def observe_rows(observer: Observer, seen: Any, chunk: PromptChunk, cache: KVCache) -> Any:
    """`observe` of a chunk with a start for each row: each row by itself, in a model of this layer alone."""

    arrays, tree = jax.tree.flatten(seen)

    def observe(arrays, start, length, keys, values, *heads):
        cache = from_heads("head_major", keys[None], values[None])
        bare_q, q, k, v = (x[None] for x in heads)
        of_row = PromptChunk(0, start, length[None], bare_q, q, k, v, chunk.implementation)
        seen = observer.observe(tree.unflatten([x[None, None] for x in arrays]), of_row, cache)
        return [x[0, 0] for x in tree.flatten_up_to(seen)]

    stored, heads = (cache.keys(chunk.layer), cache.values(chunk.layer)), (chunk.bare_q, chunk.q, chunk.k, chunk.v)
    of_layer = [stack[chunk.layer] for stack in arrays]
    of_layer = jax.vmap(observe)(of_layer, chunk.start, chunk.lengths, *stored, *heads)
    return tree.unflatten([stack.at[chunk.layer].set(new) for stack, new in zip(arrays, of_layer, strict=True)])


@struct.dataclass
class QueryWindow:
    """The last queries of each prompt, oldest first; a prompt that has fewer fills the end."""

    bare_q: Float[Array, "layers batch query_heads window head_dim"]  # before rotation
    q: Float[Array, "layers batch query_heads window head_dim"]


@dataclass(frozen=True)
class LastQueries(Observer):
    """The queries of the last `count` prompt tokens, as a `QueryWindow`."""

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1 query")

    def start(self, config, *, batch, capacity, dtype):
        empty = jnp.zeros((config.layers, batch, config.query_heads, self.count, config.head_dim), dtype)
        return QueryWindow(empty, empty)

    def observe(self, seen, chunk, cache):
        slots = chunk.lengths[:, None] - self.count + jnp.arange(self.count)[None, :]
        columns = slots - chunk.start
        here = ((columns >= 0) & (columns < chunk.q.shape[2]) & (slots >= 0))[:, None, :, None]
        columns = jnp.clip(columns, 0, chunk.q.shape[2] - 1)[:, None, :, None]

        def update(window, queries):
            found = jnp.take_along_axis(queries, columns, axis=2)
            return window.at[chunk.layer].set(jnp.where(here, found, window[chunk.layer]))

        return QueryWindow(update(seen.bare_q, chunk.bare_q), update(seen.q, chunk.q))

    def resume(self, seen, added):
        places = added[:, None] + jnp.arange(self.count)[None, :]
        kept = (places < self.count)[None, :, None, :, None]
        places = jnp.minimum(places, self.count - 1)[None, :, None, :, None]
        return jax.tree.map(lambda window: jnp.where(kept, jnp.take_along_axis(window, places, axis=3), 0), seen)


class PrefillAttention(ABC):
    """How the queries of a prompt attend. Implementations are frozen dataclasses."""

    # Whether prompts that were read can be extended: a token attends alike wherever chunks begin, and `attend` takes a
    # start for each row, of rows that have ended even one beyond the end of the cache.
    extends: ClassVar[bool] = False

    def check(self, config: LlamaConfig, chunk: int) -> None:
        """Raises ValueError, naming the argument, where such prompts, in chunks of so many tokens, will not do."""
        del config, chunk

    def start(self, config: LlamaConfig, *, batch: int, capacity: int, dtype: DTypeLike) -> Any:
        """What is carried from chunk to chunk, before the first: a pytree whose arrays begin with the axes of layers
        and rows. After the last it is in the `PromptRecord`."""
        del config, batch, capacity, dtype
        return ()

    def before_layers(self, config: LlamaConfig, *, batch: int, capacity: int, chunk: int) -> Any:
        """What the lowest layer is handed, chunk by chunk."""
        del config, batch, capacity, chunk
        return ()

    @abstractmethod
    def attend(
        self, carried: Any, handed: Any, chunk: PromptChunk, cache: KVCache
    ) -> tuple[Float[Array, "batch query_heads chunk head_dim"], Any, Any]:
        """Attention of a chunk, whose keys and values stand in the cache already; what is carried on, and handed to
        the layer above."""


@dataclass(frozen=True)
class DensePrefill(PrefillAttention):
    """Causal attention to everything."""

    extends = True

    def attend(self, carried, handed, chunk, cache):
        here = {"layer": chunk.layer, "implementation": chunk.implementation}
        start = jnp.minimum(chunk.start, cache.capacity - chunk.q.shape[2])  # of rows that have ended, others fit
        return prefill_attention(chunk.q, cache, start, **here), carried, handed


@struct.dataclass
class PromptRecord:
    """What prompts leave behind besides their keys and values. `config` is that of the model that read them."""

    lengths: Int[Array, " batch"]
    logits: Float[Array, "batch vocab"]  # of each prompt's last token
    observed: tuple[Any, ...]  # of each of `observers`
    observers: tuple[Observer | PrefillAttention, ...] = struct.field(pytree_node=False)
    config: LlamaConfig = struct.field(pytree_node=False)

    @property
    def prefill(self) -> PrefillAttention:
        """How the prompts were read."""
        return next(way for way in self.observers if isinstance(way, PrefillAttention))

    def seen(self, observer: Observer | PrefillAttention) -> Any:
        """What the observer (or the prefill attention) kept.

        Raises ValueError if the prompts were read without it.
        """
        if observer not in self.observers:
            raise ValueError(f"the prompts were read without {observer}; name its policy when reading them")
        return self.observed[self.observers.index(observer)]


@struct.dataclass
class Prefilled:
    """Prompts that have been read: any policy can go on from here, several from the same one."""

    cache: KVCache
    prompts: PromptRecord
