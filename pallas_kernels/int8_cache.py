"""A KV cache in int8: a little over half of bfloat16's bytes, over a quarter of float32's.

Of every token and kv head, keys and values are multiples of a scale each: the largest channel becomes 127 or -127, so
nothing moves by more than 1/254 of it.

No layer of it is ever dequantized for a query: all channels of a token have the same scale, so it goes outside of the
products (`ops/cache_products.py`), where the multiples stand as they are. They are exact in bfloat16.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels.cache import CacheShape, KVCache, empty_cache, register, with_slots
from pallas_kernels.dispatch import preferred_layout


def quantize(
    vectors: Float[Array, "*shape head_dim"],
) -> tuple[Int8[Array, "*shape head_dim"], Float[Array, " *shape"]]:
    """Vectors as int8 multiples of float32 scales: the largest channel becomes 127 or -127."""
    wide = vectors.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / 127
    # The multiples of a vector of zeros are zeros, whatever its scale; below `tiny`, processors take a number for 0.
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1.0, scales)
    return jnp.round(wide / scales[..., None]).astype(jnp.int8), scales


def dequantize(
    multiples: Int8[Array, "*shape head_dim"], scales: Float[Array, " *shape"], dtype: DTypeLike
) -> Float[Array, "*shape head_dim"]:
    """The vectors that multiples and scales stand for."""
    return (multiples.astype(jnp.float32) * scales[..., None]).astype(dtype)


@register
@dataclass(frozen=True)
class Int8HeadMajor(KVCache):
    """`HeadMajor` with int8 multiples. Tokens are quantized when they are written, and read in `read_as`.

    No TPU kernel takes it: operations run in XLA.
    """

    k: Int8[Array, "layers batch kv_heads capacity head_dim"]
    k_scales: Float[Array, "layers batch kv_heads capacity"]  # float32
    v: Int8[Array, "layers batch kv_heads capacity head_dim"]
    v_scales: Float[Array, "layers batch kv_heads capacity"]  # float32
    read_as: jnp.dtype = field(metadata={"static": True})

    @classmethod
    def empty(
        cls, *, layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: DTypeLike
    ) -> "Int8HeadMajor":
        """A cache of zeros, read in `dtype`."""
        slots = (layers, batch, kv_heads, capacity)
        k, v = (jnp.zeros((*slots, head_dim), jnp.int8) for _ in "kv")
        k_scales, v_scales = (jnp.zeros(slots, jnp.float32) for _ in "kv")
        return cls(k, k_scales, v, v_scales, jnp.dtype(dtype))

    @property
    def shape(self):
        return CacheShape(*self.k.shape)

    @property
    def dtype(self):
        return self.read_as

    def empty_like(self, *, capacity):
        """In the dtype of computation: compact buffers are small, and read at every step; in the layout of kernels."""
        sizes = {**self.shape._asdict(), "capacity": capacity}
        return empty_cache(preferred_layout(None), **sizes, dtype=self.dtype)

    def extended(self, *, capacity):
        return with_slots(self, capacity, axis=3)

    def keys(self, layer):
        return dequantize(self.k[layer], self.k_scales[layer], self.dtype)

    def values(self, layer):
        return dequantize(self.v[layer], self.v_scales[layer], self.dtype)

    def block(self, layer, start, size):
        k, k_scales, v, v_scales = self.stored_block(layer, start, size)
        return dequantize(k, k_scales, self.dtype), dequantize(v, v_scales, self.dtype)

    def stored_block(
        self, layer: int | Int[Array, ""], start: int | Int[Array, ""], size: int
    ) -> tuple[
        Int8[Array, "batch kv_heads {size} head_dim"],
        Float[Array, "batch kv_heads {size}"],
        Int8[Array, "batch kv_heads {size} head_dim"],
        Float[Array, "batch kv_heads {size}"],
    ]:
        """`block` as it is stored: keys, their scales, values, their scales."""

        def read(stack):
            shape = (1, self.batch, self.kv_heads, size, *stack.shape[4:])
            return lax.dynamic_slice(stack, (layer, 0, 0, start, 0)[: stack.ndim], shape)[0]

        return read(self.k), read(self.k_scales), read(self.v), read(self.v_scales)

    def gather(self, layer, slots):
        # Straight from the stacks, as in `HeadMajor`.
        rows, heads = jnp.arange(self.batch)[:, None, None], jnp.arange(self.kv_heads)[None, :, None]

        def read(multiples, scales):
            at = (layer, rows, heads, slots)
            return dequantize(multiples.at[at].get(mode="clip"), scales.at[at].get(mode="clip"), self.dtype)

        return read(self.k, self.k_scales), read(self.v, self.v_scales)

    def append(self, layer, slots, k, v):
        rows, heads = jnp.arange(self.batch)[:, None], jnp.arange(self.kv_heads)[None, :]
        at = (layer, rows, heads, slots[:, None])
        return self._with(lambda stack, token: stack.at[at].set(token, mode="drop"), k, v)

    def write(self, layer, start, k, v):
        at = (layer, 0, 0, start, 0)
        return self._with(lambda stack, new: lax.dynamic_update_slice(stack, new[None], at[: stack.ndim]), k, v)

    def as_read(self, k, v):
        k, v = (dequantize(*quantize(vectors), self.dtype) for vectors in (k, v))
        return k, v

    def _with(self, put, k, v) -> "Int8HeadMajor":
        (k, k_scales), (v, v_scales) = quantize(k), quantize(v)
        keys, values = (put(self.k, k), put(self.k_scales, k_scales)), (put(self.v, v), put(self.v_scales, v_scales))
        return Int8HeadMajor(*keys, *values, self.read_as)
