"""The queries of several steps in a TPU kernel: their order, their logits, and how many of these the VMEM holds."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.cache import LANES, TokenMajor
from pallas_kernels.ops import running_softmax, token_major


class Queries(NamedTuple):
    """A row's queries, kv head by kv head: query head g of one at step t is number g * steps + t of its `width`. The
    rest fill up a tile, so that products with different rows of the cache share none."""

    kv_heads: int
    group: int
    steps: int
    width: int

    @property
    def number(self) -> int:
        return self.kv_heads * self.width

    def of(self, member: int, step: int) -> Any:
        """For a load with a stride: of all kv heads the query of one query head at one step."""
        return pl.ds(member * self.steps + step, self.kv_heads, self.width if self.kv_heads > 1 else None)


def arrange(cache: TokenMajor, query_heads: int, steps: int) -> Queries:
    group = query_heads // cache.kv_heads
    share = token_major.SUBLANES // math.gcd(token_major.SUBLANES, cache.pack)
    return Queries(cache.kv_heads, group, steps, pl.cdiv(group * steps, share) * share)


def expand(
    q: Float[Array, "batch query_heads steps head_dim"], queries: Queries, cache: TokenMajor
) -> Float[Array, "batch queries lanes"]:
    """In this order, each in the lanes of its kv head, in the dtype of the cache."""
    batch, _, _, head_dim = q.shape
    grouped = q.reshape(batch, queries.kv_heads, -1, head_dim)
    filled = jnp.pad(grouped, ((0, 0), (0, 0), (0, queries.width - grouped.shape[2]), (0, 0)))
    return token_major.expand_queries(filled.reshape(batch, queries.number, head_dim), cache)


def collect(
    out: Float[Array, "batch queries lanes"], queries: Queries, cache: TokenMajor
) -> Float[Array, "batch query_heads steps head_dim"]:
    """The opposite."""
    batch, head_dim = out.shape[0], cache.head_dim
    by_head = token_major.collect_heads(out, cache).reshape(batch, queries.kv_heads, queries.width, head_dim)
    return by_head[:, :, : queries.group * queries.steps].reshape(batch, -1, queries.steps, head_dim)


def keep(
    logits: Any, found: jax.Array, place: jax.Array, queries: Queries, *, first_own: jax.Array, last: jax.Array
) -> None:
    """Stores what was `found` of a block, [queries, tokens], in `place` of `logits`; the lowest of all numbers where a
    query does not attend. Of the block's slots step 0 attends those up to `first_own`, and no step one after `last`;
    both may lie in a later block."""
    running_softmax.keep(logits, found, place)
    tokens = found.shape[1]
    tiles = pl.cdiv(tokens, LANES)
    attended_by_all = jnp.clip(jnp.minimum(first_own, last) + 1, 0, tokens) // LANES

    # Every query attends the first slot of all, so add_block makes a weight of 0 of LOWEST without being told.
    @pl.loop(attended_by_all, tiles)
    def _(tile):
        query = lax.broadcasted_iota(jnp.int32, (queries.number, LANES), 0)
        own = jnp.minimum(first_own + lax.rem(lax.rem(query, queries.width), queries.steps), last)
        slot = tile * LANES + lax.broadcasted_iota(jnp.int32, (queries.number, LANES), 1)
        stored = logits[place * tiles + tile]
        logits[place * tiles + tile] = jnp.where(slot <= own, stored, running_softmax.LOWEST)


def kept(logits: Any, place: jax.Array, tokens: int) -> jax.Array:
    """The opposite: [queries, tokens]."""
    tiles = pl.cdiv(tokens, LANES)
    return jnp.concatenate([logits[place * tiles + tile] for tile in range(tiles)], axis=1)[:, :tokens]
