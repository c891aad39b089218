"""The KV cache in three layouts, behind one small set of functions; every operation takes any of them.

`HeadMajor` is what XLA reads fastest on CPU and GPU: all tokens of a head are contiguous, so a step is one batched
product over the cache as it lies. (32,768 tokens, 8 kv heads, head_dim 64, float32, 2 CPU cores: 27 ms a layer, against
129 to 151 ms from `TokenMajor`.)

`TokenMajor` is what the TPU kernels read: all that a layer keeps of a token is one contiguous piece, whole tiles of
memory, so one DMA appends a token or fetches a selected one, and keys can be streamed without values. A tile is 128
lanes wide; head_dim 64 packs two heads into a row, where head-major storage would pad each to twice its bytes.

Both hold a stack of layers, of which an operation reads one. Passing the stack and an index, not a slice, is what keeps
a layer's cache from being copied before every kernel. XLA's products on a CPU copy it all the same, three times the
bytes of a decode step; `PerLayer` is for them: head-major, every layer an array of its own.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import GetAttrKey, register_pytree_with_keys
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Layout = Literal["head_major", "token_major", "per_layer"]
LANES = 128


class CacheShape(NamedTuple):
    """The sizes of a cache, whatever its layout."""

    layers: int
    batch: int
    kv_heads: int
    capacity: int  # slots per row and kv head
    head_dim: int


class KVCache(ABC):
    """A stack of layers of keys and values."""

    @property
    @abstractmethod
    def shape(self) -> CacheShape:
        """The sizes."""

    @property
    @abstractmethod
    def dtype(self) -> jnp.dtype:
        """Of keys and values alike."""

    layers = property(lambda self: self.shape.layers)
    batch = property(lambda self: self.shape.batch)
    kv_heads = property(lambda self: self.shape.kv_heads)
    capacity = property(lambda self: self.shape.capacity)
    head_dim = property(lambda self: self.shape.head_dim)

    @abstractmethod
    def empty_like(self, *, capacity: int) -> "KVCache":
        """Zeros of another capacity, for tokens of this one: like it, but in the dtype in which it is read."""

    @abstractmethod
    def extended(self, *, capacity: int) -> "KVCache":
        """The same with more slots in every row, empty ones, after those there are."""

    @abstractmethod
    def keys(self, layer: int | Int[Array, ""]) -> Float[Array, "batch kv_heads capacity head_dim"]:
        """The keys of one layer, head by head."""

    @abstractmethod
    def values(self, layer: int | Int[Array, ""]) -> Float[Array, "batch kv_heads capacity head_dim"]:
        """The values of one layer, head by head."""

    @abstractmethod
    def block(
        self, layer: int | Int[Array, ""], start: int | Int[Array, ""], size: int
    ) -> tuple[Float[Array, "batch kv_heads {size} head_dim"], Float[Array, "batch kv_heads {size} head_dim"]]:
        """The keys and values in `size` slots of one layer from `start` on, which must all exist."""

    @abstractmethod
    def gather(
        self, layer: int | Int[Array, ""], slots: Int[Array, "batch kv_heads count"]
    ) -> tuple[Float[Array, "batch kv_heads count head_dim"], Float[Array, "batch kv_heads count head_dim"]]:
        """The keys and values in some slots of one layer; one that does not exist reads another that does."""

    @abstractmethod
    def append(
        self,
        layer: int | Int[Array, ""],
        slots: Int[Array, " batch"],
        k: Float[Array, "batch kv_heads head_dim"],
        v: Float[Array, "batch kv_heads head_dim"],
    ) -> "KVCache":
        """Each row's token written to its slot of one layer; a slot past the end writes nothing."""

    @abstractmethod
    def write(
        self,
        layer: int | Int[Array, ""],
        start: int | Int[Array, ""],
        k: Float[Array, "batch kv_heads tokens head_dim"],
        v: Float[Array, "batch kv_heads tokens head_dim"],
    ) -> "KVCache":
        """Consecutive tokens written to the slots from `start` on, which must all exist."""

    def as_read(
        self, k: Float[Array, "*shape head_dim"], v: Float[Array, "*shape head_dim"]
    ) -> tuple[Float[Array, "*shape head_dim"], Float[Array, "*shape head_dim"]]:
        """What is read of keys and values that were written."""
        return k.astype(self.dtype), v.astype(self.dtype)


def with_slots[Cache: KVCache](cache: Cache, capacity: int, *, axis: int) -> Cache:
    """`cache` with zeros up to `capacity` slots, which are `axis` of each of its arrays."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, capacity - size if at == axis else 0) for at, size in enumerate(x.shape)])

    return jax.tree.map(pad, cache)


def register[Cache: type](cls: Cache) -> Cache:
    """Registers a dataclass; unflattening checks nothing, for a tree of caches may hold shardings, shapes, anything."""
    data = [field.name for field in fields(cls) if not field.metadata.get("static")]
    static = [field.name for field in fields(cls) if field.metadata.get("static")]

    def flatten(cache):
        return [(GetAttrKey(name), getattr(cache, name)) for name in data], tuple(getattr(cache, n) for n in static)

    def unflatten(aux, children):
        cache = object.__new__(cls)
        for name, value in zip((*data, *static), (*children, *aux), strict=True):
            object.__setattr__(cache, name, value)
        return cache

    register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@register
@dataclass(frozen=True)
class HeadMajor(KVCache):
    """Keys and values apart, the tokens of a head together."""

    k: Float[Array, "layers batch kv_heads capacity head_dim"]
    v: Float[Array, "layers batch kv_heads capacity head_dim"]

    @property
    def shape(self):
        return CacheShape(*self.k.shape)

    @property
    def dtype(self):
        return self.k.dtype

    def empty_like(self, *, capacity):
        shape = (*self.k.shape[:3], capacity, self.head_dim)
        return HeadMajor(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def extended(self, *, capacity):
        return with_slots(self, capacity, axis=3)

    def keys(self, layer):
        return self.k[layer]

    def values(self, layer):
        return self.v[layer]

    def block(self, layer, start, size):
        shape = (1, self.batch, self.kv_heads, size, self.head_dim)
        k, v = (lax.dynamic_slice(stack, (layer, 0, 0, start, 0), shape)[0] for stack in (self.k, self.v))
        return k, v

    def gather(self, layer, slots):
        # Straight from the stack: of a slice of it, XLA would copy the whole layer first. The default mode would
        # compare every slot with the bounds once more, to write NaN where it lies outside.
        rows, heads = jnp.arange(self.batch)[:, None, None], jnp.arange(self.kv_heads)[None, :, None]
        k, v = (stack.at[layer, rows, heads, slots].get(mode="clip") for stack in (self.k, self.v))
        return k, v

    def append(self, layer, slots, k, v):
        rows = jnp.arange(self.batch)
        return HeadMajor(
            *(
                stack.at[layer, rows, :, slots].set(token.astype(stack.dtype), mode="drop")
                for stack, token in ((self.k, k), (self.v, v))
            )
        )

    def write(self, layer, start, k, v):
        at = (layer, 0, 0, start, 0)
        return HeadMajor(
            *(
                lax.dynamic_update_slice(stack, tokens[None].astype(stack.dtype), at)
                for stack, tokens in ((self.k, k), (self.v, v))
            )
        )


@register
@dataclass(frozen=True)
class PerLayer(KVCache):
    """`HeadMajor` with an array for each layer. Layers are named by Python's ints: loops over them are unrolled."""

    k: tuple[Float[Array, "batch kv_heads capacity head_dim"], ...]
    v: tuple[Float[Array, "batch kv_heads capacity head_dim"], ...]

    @classmethod
    def of(cls, stack: HeadMajor) -> "PerLayer":
        """The layers of a stack, copied."""
        layers = range(stack.layers)
        return cls(tuple(stack.k[layer] for layer in layers), tuple(stack.v[layer] for layer in layers))

    @property
    def shape(self):
        return CacheShape(len(self.k), *self.k[0].shape)

    @property
    def dtype(self):
        return self.k[0].dtype

    def empty_like(self, *, capacity):
        shape = (*self.k[0].shape[:2], capacity, self.head_dim)
        k, v = (tuple(jnp.zeros(shape, self.dtype) for _ in self.k) for _ in "kv")
        return PerLayer(k, v)

    def extended(self, *, capacity):
        return with_slots(self, capacity, axis=2)

    def keys(self, layer):
        return self.k[layer]

    def values(self, layer):
        return self.v[layer]

    def block(self, layer, start, size):
        return self._alone(layer).block(0, start, size)

    def gather(self, layer, slots):
        return self._alone(layer).gather(0, slots)

    def append(self, layer, slots, k, v):
        rows = jnp.arange(self.batch)
        return self._with(
            layer,
            *(
                stored.at[rows, :, slots].set(token.astype(stored.dtype), mode="drop")
                for stored, token in ((self.k[layer], k), (self.v[layer], v))
            ),
        )

    def write(self, layer, start, k, v):
        return self._with(
            layer,
            *(
                lax.dynamic_update_slice(stored, tokens.astype(stored.dtype), (0, 0, start, 0))
                for stored, tokens in ((self.k[layer], k), (self.v[layer], v))
            ),
        )

    def _alone(self, layer: Any) -> HeadMajor:
        return HeadMajor(self.k[layer][None], self.v[layer][None])

    def _with(self, layer: Any, k: jax.Array, v: jax.Array) -> "PerLayer":
        # Or XLA writes the token twice, once for who reads the layer now and once for the next step, in copies.
        k, v = lax.optimization_barrier((k, v))
        return PerLayer(
            *((*old[:layer], new, *old[layer + 1 :]) for old, new in ((self.k, k), (self.v, v))),
        )


@register
@dataclass(frozen=True)
class TokenMajor(KVCache):
    """All of a token together: its keys, then its values. `lanes = pack * head_dim` and `rows = kv_heads / pack`.

    Kv head h lies in row h // pack, from lane (h % pack) * head_dim on.
    """

    kv: Float[Array, "layers batch capacity 2 rows lanes"]
    pack: int = field(metadata={"static": True})

    @property
    def shape(self):
        layers, batch, capacity, _, rows, lanes = self.kv.shape
        return CacheShape(layers, batch, rows * self.pack, capacity, lanes // self.pack)

    @property
    def dtype(self):
        return self.kv.dtype

    def empty_like(self, *, capacity):
        shape = (self.layers, self.batch, capacity, *self.kv.shape[3:])
        return TokenMajor(jnp.zeros(shape, self.dtype), self.pack)

    def extended(self, *, capacity):
        return with_slots(self, capacity, axis=2)

    def keys(self, layer):
        return self._heads(self.kv[layer, :, :, 0])

    def values(self, layer):
        return self._heads(self.kv[layer, :, :, 1])

    def block(self, layer, start, size):
        shape = (1, self.batch, size, *self.kv.shape[3:])
        tokens = lax.dynamic_slice(self.kv, (layer, 0, start, 0, 0, 0), shape)[0]
        return self._heads(tokens[:, :, 0]), self._heads(tokens[:, :, 1])

    def gather(self, layer, slots):
        at = slots[..., None]
        k, v = (jnp.take_along_axis(x, at, axis=2, mode="clip") for x in (self.keys(layer), self.values(layer)))
        return k, v

    def _heads(self, tokens):
        return jnp.swapaxes(tokens.reshape(*tokens.shape[:2], self.kv_heads, self.head_dim), 1, 2)

    def append(self, layer, slots, k, v):
        tokens = jnp.stack([k, v], axis=1).reshape(self.batch, *self.kv.shape[3:])
        kv = self.kv.at[layer, jnp.arange(self.batch), slots].set(tokens.astype(self.dtype), mode="drop")
        return TokenMajor(kv, self.pack)

    def write(self, layer, start, k, v):
        tokens = jnp.stack([jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)], axis=2)
        tokens = tokens.reshape(1, *tokens.shape[:2], *self.kv.shape[3:]).astype(self.dtype)
        return TokenMajor(lax.dynamic_update_slice(self.kv, tokens, (layer, 0, start, 0, 0, 0)), self.pack)


def empty_cache(
    layout: Layout, *, layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: DTypeLike
) -> KVCache:
    """A cache of zeros."""
    if layout != "token_major":
        shape = (layers, batch, kv_heads, capacity, head_dim)
        stack = HeadMajor(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        return stack if layout == "head_major" else PerLayer.of(stack)
    pack = heads_per_row(kv_heads, head_dim)
    shape = (layers, batch, capacity, 2, kv_heads // pack, pack * head_dim)
    return TokenMajor(jnp.zeros(shape, dtype), pack)


def from_heads(
    layout: Layout,
    k: Float[Array, "batch kv_heads capacity head_dim"],
    v: Float[Array, "batch kv_heads capacity head_dim"],
) -> KVCache:
    """A cache of one layer that holds these keys and values, slot by slot."""
    if layout == "head_major":
        return HeadMajor(k[None], v[None])
    if layout == "per_layer":
        return PerLayer((k,), (v,))
    batch, kv_heads, capacity, head_dim = k.shape
    pack = heads_per_row(kv_heads, head_dim)
    tokens = jnp.stack([jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)], axis=2)
    return TokenMajor(tokens.reshape(1, batch, capacity, 2, kv_heads // pack, pack * head_dim), pack)


def heads_per_row(kv_heads: int, head_dim: int) -> int:
    """How many kv heads share one row of 128 lanes; 1 where they do not fill it."""
    pack = LANES // head_dim if LANES % head_dim == 0 else 1
    return pack if kv_heads % pack == 0 else 1
