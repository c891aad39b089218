"""Softmax over logits that arrive block by block, in the scratch memory of a TPU kernel.

Source: Milakov and Gimelshein 2018 (arXiv 1805.02867). What was summed relative to a smaller largest logit is scaled
down when a larger one comes. Scores, which need the final normaliser for every token, are made at the end of a row from
its logits, which stay in VMEM until then: 4 bytes per token and query head, against a second read of the keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache import LANES

TILES_TOGETHER = 8  # one alone leaves the units waiting for each other
LOWEST = float(jnp.finfo(jnp.float32).min)  # of no logit; -inf would make NaN of -inf - -inf


class Running(NamedTuple):
    """Scratch of [query_heads, LANES] float32, equal in all lanes, as later reads want it; in a kernel, references."""

    largest: Any  # logit so far
    total: Any  # of exp(logit - largest)


def running(query_heads: int) -> Running:
    """The scratch shapes."""
    return Running(*(pltpu.VMEM((query_heads, LANES), jnp.float32) for _ in range(2)))


def start(state: Running) -> None:
    state.largest[...] = jnp.full(state.largest.shape, LOWEST, jnp.float32)
    state.total[...] = jnp.zeros(state.total.shape, jnp.float32)


def add_block(state: Running, logits: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes a block [query_heads, tokens] in: exp(logit - largest), 0 if not visible, and the factor on older sums.

    Logits that are not visible may be NaN.
    """
    before = state.largest[:, :1]
    largest = jnp.maximum(before, jnp.max(jnp.where(visible, logits, LOWEST), axis=1, keepdims=True))
    # The choice is made again: where nothing is visible yet, LOWEST - LOWEST is 0 and its weight would be 1.
    weights = jnp.where(visible, jnp.exp(logits - largest), 0.0)
    older = jnp.exp(before - largest)
    total = older * state.total[:, :1] + jnp.sum(weights, axis=1, keepdims=True)
    state.largest[...] = jnp.broadcast_to(largest, state.largest.shape)
    state.total[...] = jnp.broadcast_to(total, state.total.shape)
    return weights, older


def normaliser(total: jax.Array) -> jax.Array:
    """1 / total. The largest weight is 1, so a total below 1 is the 0 of a query that saw nothing: its zeros stay."""
    return 1.0 / jnp.maximum(total, 1.0)


def kept_logits(query_heads: int, blocks: int, tokens: int) -> pl.MemoryRef:
    """The scratch shape for a row's logits, [tiles, query_heads, LANES]: a tile of tokens after the other."""
    return pltpu.VMEM((pl.cdiv(blocks * tokens, LANES), query_heads, LANES), jnp.float32)


def keep(kept: jax.Ref, logits: jax.Array, block: jax.Array) -> None:
    """Stores the logits [query_heads, tokens] of a block: whole tiles, or all of the row."""
    tokens = logits.shape[1]
    first_tile = block * (tokens // LANES)
    for tile in range(pl.cdiv(tokens, LANES)):
        part = logits[:, tile * LANES : (tile + 1) * LANES]
        kept[first_tile + tile, :, : part.shape[1]] = part


def write_scores(scores: jax.Ref, kept: jax.Ref, state: Running, length: jax.Array, group_reduction: str) -> None:
    """Probabilities of a row's tokens, reduced over the query heads of a kv head, to [1, kv_heads, capacity]; or to
    [1, query_heads, capacity], not reduced: then each is the only one of its kind."""
    _, kv_heads, capacity = scores.shape
    group = kept.shape[1] // kv_heads
    # Query heads of one kv head follow each other: a load with a stride takes the g-th of every kv head.
    members = [pl.ds(g, kv_heads, group) if group > 1 else pl.ds(0, kv_heads) for g in range(group)]
    largest = [state.largest[member, :] for member in members]
    factor = [normaliser(state.total[member, :]) for member in members]
    if group_reduction == "mean":
        factor = [one / group for one in factor]
    join = jnp.maximum if group_reduction == "max" else jnp.add

    def probabilities(tile: jax.Array | int) -> jax.Array:
        heads = [jnp.exp(kept[tile, member, :] - largest[g]) * factor[g] for g, member in enumerate(members)]
        token = tile * LANES + lax.broadcasted_iota(jnp.int32, (kv_heads, LANES), 1)
        # The choice keeps out what was never written, beside what is padding.
        return jnp.where(token < length, functools.reduce(join, heads), 0.0)

    tiles = capacity // LANES
    groups = tiles // TILES_TOGETHER
    in_use = jnp.minimum(pl.cdiv(length, TILES_TOGETHER * LANES), groups)

    def store(tile: jax.Array | int, values: jax.Array) -> None:
        scores[0, :, pl.ds(pl.multiple_of(jnp.asarray(tile) * LANES, LANES), LANES)] = values

    if groups:

        @pl.loop(0, in_use)
        def _(together):
            for tile in range(TILES_TOGETHER):
                store(together * TILES_TOGETHER + tile, probabilities(together * TILES_TOGETHER + tile))

        @pl.loop(in_use, groups)
        def _(together):
            for tile in range(TILES_TOGETHER):
                store(together * TILES_TOGETHER + tile, jnp.zeros((kv_heads, LANES), jnp.float32))

    for tile in range(groups * TILES_TOGETHER, tiles):
        store(tile, probabilities(tile))
    if capacity % LANES:
        scores[0, :, tiles * LANES :] = probabilities(tiles)[:, : capacity % LANES]
