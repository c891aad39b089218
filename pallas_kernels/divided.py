"""A cache whose slots are divided over the devices of a mesh axis: for contexts longer than the memory of one.

Every device holds a run of neighbouring slots of its rows and heads. An operation runs on each part, and what they find
is merged: softmaxes by their largest logits and sums, selected tokens by adding up what the one who has a token gives.
So no more than results travel, never keys and values of tokens that nobody selected.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Int

from pallas_kernels.cache import HeadMajor, KVCache, TokenMajor, register
from pallas_kernels.mesh import (
    EVERYWHERE,
    SLOTS,
    devices,
    laid_out,
    on_parts,
    parts,
    rows_and_heads,
    rows_only,
    spec_of,
)


@register
@dataclass(frozen=True)
class Divided(KVCache):
    """`whole` has all slots; its arrays lie on the mesh."""

    whole: HeadMajor | TokenMajor

    @property
    def shape(self):
        return self.whole.shape

    @property
    def dtype(self):
        return self.whole.dtype

    def empty_like(self, *, capacity):
        """Not divided: a compact buffer is read by all."""
        return self.whole.empty_like(capacity=capacity)

    def extended(self, *, capacity):
        """Slots move to where they belong among the new ones. Raises as `on_mesh`."""
        return on_mesh(self.whole.extended(capacity=capacity))

    def keys(self, layer):
        return self.whole.keys(layer)

    def values(self, layer):
        return self.whole.values(layer)

    def block(self, layer, start, size):
        slots = jnp.broadcast_to(start + jnp.arange(size), (self.batch, self.kv_heads, size))
        return self.gather(layer, slots)

    def gather(self, layer, slots):
        def in_part(part: KVCache, layer: Array, slots: Array):
            local = slots - first_slot(part)
            here = ((local >= 0) & (local < part.capacity))[..., None]
            found = part.gather(layer, jnp.clip(local, 0, part.capacity - 1))
            return tuple(lax.psum(jnp.where(here, x, jnp.zeros((), x.dtype)), SLOTS) for x in found)

        heads = rows_and_heads(slots)
        return on_parts(in_part, (self.whole, layer, slots), (self.spec, EVERYWHERE, heads), (heads, heads))

    def append(self, layer, slots, k, v):
        def in_part(part: KVCache, layer: Array, slots: Array, k: Array, v: Array):
            local = slots - first_slot(part)
            return part.append(layer, jnp.where(local < 0, part.capacity, local), k, v)

        specs = (self.spec, EVERYWHERE, rows_only(slots), rows_and_heads(k), rows_and_heads(v))
        return Divided(on_parts(in_part, (self.whole, layer, slots, k, v), specs, self.spec))

    def write(self, layer, start, k, v):
        def in_part(part: KVCache, layer: Array, start: Array, k: Array, v: Array):
            size = min(k.shape[2], part.capacity)
            first = start - first_slot(part)
            local = jnp.clip(first, 0, part.capacity - size)
            token = local - first + jnp.arange(size)  # which of the tokens each of the slots from `local` on gets
            ours = ((token >= 0) & (token < k.shape[2]))[:, None]
            token = jnp.clip(token, 0, k.shape[2] - 1)
            old = part.block(layer, local, size)
            new = (jnp.where(ours, x[:, :, token], before) for x, before in zip((k, v), old, strict=True))
            return part.write(layer, local, *new)

        specs = (self.spec, EVERYWHERE, EVERYWHERE, rows_and_heads(k), rows_and_heads(v))
        return Divided(on_parts(in_part, (self.whole, layer, start, k, v), specs, self.spec))

    @property
    def spec(self) -> PartitionSpec:
        """Of each of its arrays."""
        return spec_of(self.whole, slots=SLOTS)


def on_mesh(cache: KVCache) -> KVCache:
    """`cache` laid out on the mesh in use, if there is one; `Divided` if that has several parts for its slots.

    Raises ValueError for slots that cannot be divided evenly, or not at all.
    """
    if isinstance(cache, Divided):
        return Divided(laid_out(cache.whole, slots=SLOTS))
    if devices() == 1:
        return cache
    if parts() == 1:
        return laid_out(cache)
    if not isinstance(cache, HeadMajor | TokenMajor):
        raise ValueError(
            f"a cache of {type(cache).__name__} is not for a mesh that divides the slots of a row, "
            f"expected {SLOTS}=1, not {parts()}"
        )
    if cache.capacity % parts():
        raise ValueError(f"capacity={cache.capacity} must be a multiple of the mesh's {SLOTS}={parts()}")
    return Divided(laid_out(cache, slots=SLOTS))


def first_slot(part: KVCache) -> Int[Array, ""]:
    """The slot of the whole cache that is slot 0 of this device's part."""
    return lax.axis_index(SLOTS) * part.capacity


def visible_slots(part: KVCache, lengths: Int[Array, " batch"]) -> Bool[Array, "batch 1 capacity"]:
    """Which slots of this device's part are in use."""
    return first_slot(part) + jnp.arange(part.capacity)[None, None, :] < lengths[:, None, None]
