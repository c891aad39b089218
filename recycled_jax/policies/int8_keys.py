"""Scores from an int8 copy of the keys: a scorer that reads half of bfloat16's bytes, or a quarter of float32's."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.int8_cache import quantize
from recycled_jax.frame import GroupReduction, Scorer
from recycled_jax.frame.scorers import check_group_reduction


@struct.dataclass
class QuantizedKeys:
    """Keys as multiples of a scale that each token has in each kv head."""

    multiples: Int[Array, "layers batch kv_heads capacity head_dim"]  # int8, -127 to 127
    scales: Float[Array, "layers batch kv_heads capacity"]  # float32


@dataclass(frozen=True)
class Int8Scorer(Scorer):
    """As `AttentionScorer`, from keys rounded to int8 by each token's largest channel (ours). The copy is for scoring
    alone: attention reads the keys themselves."""

    group_reduction: GroupReduction = "max"

    def __post_init__(self) -> None:
        check_group_reduction(self.group_reduction)

    def begin(self, prefilled, *, implementation):
        cache = prefilled.cache

        def of_layer(layer, copy):
            multiples, scales = quantize(cache.keys(layer))
            return QuantizedKeys(copy.multiples.at[layer].set(multiples), copy.scales.at[layer].set(scales))

        shape = (cache.layers, cache.batch, cache.kv_heads, cache.capacity)
        empty = QuantizedKeys(jnp.zeros((*shape, cache.head_dim), jnp.int8), jnp.zeros(shape, jnp.float32))
        return lax.fori_loop(0, cache.layers, of_layer, empty)

    def append(self, state, token, here):
        multiples, scales = quantize(token.k)
        rows = jnp.arange(scales.shape[0])
        # past the end: the row writes nothing
        slots = jnp.where(here.active, here.lengths - 1, state.scales.shape[-1])
        at = (here.layer, rows, slice(None), slots)
        return QuantizedKeys(
            state.multiples.at[at].set(multiples, mode="drop"), state.scales.at[at].set(scales, mode="drop")
        )

    def score(self, token, cache, state, here):
        batch, _, head_dim = token.q.shape
        multiples, scales = state.multiples[here.layer], state.scales[here.layer]
        grouped = token.q.reshape(batch, cache.kv_heads, -1, head_dim)
        products = jnp.einsum(
            "bngd,bntd->bngt", grouped, multiples.astype(grouped.dtype), preferred_element_type=jnp.float32
        )
        logits = head_dim**-0.5 * products * scales[:, :, None, :]
        in_use = jnp.arange(cache.capacity)[None, None, None, :] < here.lengths[:, None, None, None]
        logits = jnp.where(in_use, logits, jnp.finfo(jnp.float32).min)
        probabilities = jnp.where(in_use, jax.nn.softmax(logits, axis=-1), 0.0)
        return getattr(jnp, self.group_reduction)(probabilities, axis=2)

    def reads(self, lengths, cache):
        whole, copied = cache.head_dim * cache.dtype.itemsize, cache.head_dim + 4  # bytes of a key
        return lengths * (copied / whole)
