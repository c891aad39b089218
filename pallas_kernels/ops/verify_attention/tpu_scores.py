"""The scores of a row's steps, once all of its logits are known: block by block, from VMEM to HBM.

Scores need the final normaliser of every query, and the logits of several steps are too many for the VMEM. Those of the
first blocks are kept there. The keys of the others are read a second time, which takes fewer bytes than writing their
logits to HBM and back: at Llama-3.1-8B's shapes and 9 steps 2,048 a slot against 2,304.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.cache import LANES
from pallas_kernels.checks import PER_QUERY_HEAD
from pallas_kernels.ops import fetch, running_softmax
from pallas_kernels.ops.verify_attention.tpu_queries import Queries


class Scratch(NamedTuple):
    """In a kernel, references. Of two buffers one is worked on and one on its way."""

    scores: Any  # [2, steps, heads, tokens] float32
    scores_left: Any  # a semaphore for each
    keys: tuple[Any, Any]  # two of [1, 1, tokens, parts, rows, lanes]
    keys_came: Any


def scratch(steps: int, heads: int, tokens: int, key_block: tuple[int, ...], dtype: DTypeLike) -> Scratch:
    """The scratch shapes."""
    return Scratch(
        scores=pltpu.VMEM((2, steps, heads, tokens), jnp.float32),
        scores_left=pltpu.SemaphoreType.DMA((2,)),
        keys=(pltpu.VMEM(key_block, dtype), pltpu.VMEM(key_block, dtype)),
        keys_came=pltpu.SemaphoreType.DMA((2,)),
    )


def write(
    scores: Any,
    held: Scratch,
    logits: Any,
    state: running_softmax.Running,
    queries: Queries,
    *,
    row: jax.Array,
    end: jax.Array,
    kept: int,
    group_reduction: str,
    key_copy: Callable[[jax.Array, int, Callable[[Any], None]], None],
    take_logits: Callable[[Any, Any, Any], None],
) -> None:
    """Probabilities of a row's slots, of which `end` are in use, reduced over the query heads of a kv head or not, to
    `scores` [batch, steps, heads, blocks of slots].

    `logits` has those of the first `kept` blocks. Of another, `key_copy(block, buffer, act)` acts on the copy of its
    keys to a buffer, and `take_logits(keys, block, place)` puts its logits where there is room for one more.
    """
    tokens = held.scores.shape[3]
    blocks = scores.shape[3] // tokens

    def send(block: jax.Array, place: jax.Array | int) -> None:
        buffer = lax.rem(block, 2)
        piece, left = held.scores.at[buffer], held.scores_left.at[buffer]
        pl.when(block >= 2)(lambda: fetch.wait(piece, left))
        in_use = block * tokens < end
        pl.when(in_use)(lambda: probabilities(piece, logits, place, state, queries, group_reduction))

        @pl.when(jnp.logical_not(in_use))
        def _():
            piece[...] = jnp.zeros(piece.shape, jnp.float32)

        into = scores.at[row]
        if blocks > 1:
            into = into.at[:, :, pl.ds(pl.multiple_of(block * tokens, LANES), tokens)]
        fetch.start(piece, into, left)

    if kept:

        @pl.loop(0, kept)
        def _(block):
            send(block, block)

    def score_again(block: jax.Array, buffer: int) -> None:
        """Starts a block on its way and takes in the one before."""
        pl.when(block < blocks)(lambda: key_copy(block, buffer, lambda copy: copy.start()))

        @pl.when((block > kept) & (block <= blocks))
        def _():
            key_copy(block - 1, 1 - buffer, lambda copy: copy.wait())
            take_logits(held.keys[1 - buffer], block - 1, jnp.int32(kept))
            send(block - 1, kept)

    if kept < blocks:

        @pl.loop(0, pl.cdiv(blocks - kept + 1, 2))
        def _(pair):
            for buffer in range(2):
                score_again(kept + 2 * pair + buffer, buffer)

    for block in range(max(blocks - 2, 0), blocks):
        fetch.wait(held.scores.at[block % 2], held.scores_left.at[block % 2])


def probabilities(
    piece: Any,
    logits: Any,
    place: jax.Array | int,
    state: running_softmax.Running,
    queries: Queries,
    group_reduction: str,
) -> None:
    """Of the block whose logits are the ones in `place`."""
    tokens = piece.shape[2]
    tiles = pl.cdiv(tokens, LANES)
    join = jnp.maximum if group_reduction == "max" else jnp.add
    for step in range(queries.steps):
        members = [queries.of(member, step) for member in range(queries.group)]
        largest = [state.largest[member, :] for member in members]
        factor = [running_softmax.normaliser(state.total[member, :]) for member in members]
        if group_reduction == "mean":
            factor = [one / queries.group for one in factor]
        for tile in range(tiles):
            some = slice(tile * LANES, min((tile + 1) * LANES, tokens))
            found = [
                (jnp.exp(logits[place * tiles + tile, member, :] - largest[g]) * factor[g])[:, : some.stop - some.start]
                for g, member in enumerate(members)
            ]
            if group_reduction == PER_QUERY_HEAD:
                for g, values in enumerate(found):
                    piece[step, pl.ds(g, queries.kv_heads, queries.group), some] = values
            else:
                piece[step, :, some] = functools.reduce(join, found)
