"""Pooling of select_tokens on TPU: the maximum over a window of slots, in a few shifts.

Maxima over windows of 1, 2, 4, .. slots come from one another, and the last step closes the gap to the window asked
for. XLA's own windowed maximum along the lanes takes about a hundred times as long.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128
SUBLANES = 8
CHUNK = 16  # vector registers worked on at once
BLOCK = 4 * CHUNK  # and per grid step
MAX_POOL = 2 * LANES - 1  # what reaches no further than the neighbouring registers


def pooled(
    scores: Float[Array, "rows tokens"], begin: int, end: Int[Array, " rows"], pool: int
) -> Float[Array, "rows tokens"]:
    """The largest of the scores of slots begin..end-1 within `pool // 2` slots; -inf where there is none."""
    rows, tokens = scores.shape
    held = min(rows, SUBLANES)
    limits = jnp.broadcast_to(end.astype(jnp.int32)[:, None], (rows, LANES))
    last = pl.cdiv(tokens, LANES) - 1  # register
    return pl.pallas_call(
        functools.partial(_kernel, begin=begin, pool=pool),
        grid=(pl.cdiv(rows, held), pl.cdiv(tokens, BLOCK * LANES)),
        in_specs=[
            pl.BlockSpec((held, LANES), lambda row, i: (row, 0)),
            pl.BlockSpec((held, LANES), lambda row, i: (row, jnp.maximum(i * BLOCK - 1, 0))),
            pl.BlockSpec((held, BLOCK * LANES), lambda row, i: (row, i)),
            pl.BlockSpec((held, LANES), lambda row, i: (row, jnp.minimum((i + 1) * BLOCK, last))),
        ],
        out_specs=pl.BlockSpec((held, BLOCK * LANES), lambda row, i: (row, i)),
        out_shape=jax.ShapeDtypeStruct((rows, tokens), jnp.float32),
        scratch_shapes=[pltpu.VMEM((1 + BLOCK + 1, held, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="select_pool",
    )(limits, scores, scores, scores)


def _kernel(end_ref, before_ref, scores_ref, after_ref, out_ref, window_ref, *, begin, pool):
    first = pl.program_id(1) * BLOCK - 1  # the register that window_ref begins with
    end = end_ref[...]
    lane = lax.broadcasted_iota(jnp.int32, end.shape, 1)

    def usable(register, scores):
        slot = (first + register) * LANES + lane
        return jnp.where((slot >= begin) & (slot < end), scores, -jnp.inf)

    window_ref[0] = usable(0, before_ref[...])
    window_ref[1 + BLOCK] = usable(1 + BLOCK, after_ref[...])

    @pl.loop(0, BLOCK // CHUNK)
    def _(chunk):
        scores = scores_ref[:, pl.ds(pl.multiple_of(chunk * CHUNK * LANES, LANES), CHUNK * LANES)]
        window_ref[pl.ds(1 + chunk * CHUNK, CHUNK)] = jnp.stack(
            [usable(1 + chunk * CHUNK + i, scores[:, i * LANES : (i + 1) * LANES]) for i in range(CHUNK)]
        )

    @pl.loop(0, BLOCK // CHUNK)
    def _(chunk):
        x = window_ref[pl.ds(chunk * CHUNK, CHUNK + 2)]
        width = 1  # x has the maximum over so many slots, this one and those after it
        while width < pool:
            step = min(width, pool - width)
            x = jnp.maximum(x, _left(x, step))
            width += step
        x = _right(x, pool // 2)
        out_ref[:, pl.ds(pl.multiple_of(chunk * CHUNK * LANES, LANES), CHUNK * LANES)] = jnp.concatenate(
            [x[1 + i] for i in range(CHUNK)], axis=1
        )


def _left(x: Float[Array, "registers rows 128"], lanes: int) -> Float[Array, "registers rows 128"]:
    """Every slot gets what is `lanes` after it; the last register gets nothing of use."""
    rolled = pltpu.roll(x, LANES - lanes, 2)
    following = jnp.concatenate([rolled[1:], rolled[:1]])
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 2) < LANES - lanes, rolled, following)


def _right(x: Float[Array, "registers rows 128"], lanes: int) -> Float[Array, "registers rows 128"]:
    """Every slot gets what is `lanes` before it; the first register gets nothing of use."""
    rolled = pltpu.roll(x, lanes, 2)
    previous = jnp.concatenate([rolled[-1:], rolled[:-1]])
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 2) >= lanes, rolled, previous)
