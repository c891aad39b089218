"""token_scores as a TPU kernel: as decode_attention's, of which it is the half that needs the keys alone.

A block has the keys of its tokens and leaves out the values between them, so half of the bytes move.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import KVCache
from pallas_kernels.checks import PER_QUERY_HEAD
from pallas_kernels.ops import running_softmax, token_major

BLOCK_BYTES = 4 * 2**20  # long enough to hide a step's fixed costs, short beside the VMEM


def token_scores(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    group_reduction: str,
    tokens: int | None = None,
) -> Float[Array, "batch heads capacity"]:
    """As the operation; `tokens` per block, or as many as `BLOCK_BYTES` hold.

    The logits of a row stay in VMEM until its end: 4 bytes per query head and slot.
    """
    cache = token_major.require_token_major(cache, "token_scores")
    expanded = token_major.expand_queries(q, cache)
    batch, query_heads, lanes = expanded.shape
    tokens = tokens or token_major.block_tokens(cache, BLOCK_BYTES, keys_only=True)
    blocks = pl.cdiv(cache.capacity, tokens)
    block = jax.ShapeDtypeStruct(token_major.block_shape(cache, tokens, keys_only=True), cache.dtype)
    heads = query_heads if group_reduction == PER_QUERY_HEAD else cache.kv_heads
    scores = jax.ShapeDtypeStruct((batch, heads, cache.capacity), jnp.float32)
    scratch = [
        running_softmax.running(query_heads),
        running_softmax.kept_logits(query_heads, blocks, tokens),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, rows=cache.kv.shape[4], scale=scale, group_reduction=group_reduction),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, blocks),
            in_specs=[
                pl.BlockSpec((1, query_heads, lanes), token_major.of_row),
                pl.BlockSpec(block.shape, functools.partial(token_major.block_in_use, tokens)),
            ],
            out_specs=pl.BlockSpec(token_major.row_of(scores).shape, token_major.of_row),
            scratch_shapes=scratch,
        ),
        out_shape=scores,
        name="token_scores",
        compiler_params=token_major.compiler_params(
            "token_scores", blocks=[block, token_major.row_of(expanded), token_major.row_of(scores)], scratch=scratch
        ),
    )(jnp.asarray(layer, jnp.int32).reshape(1), lengths.astype(jnp.int32), expanded, token_major.stored(cache))


def _kernel(layer, lengths, q, keys, scores, state, kept, *, rows, scale, group_reduction):
    step, tokens = pl.program_id(1), keys.shape[2]
    length = lengths[pl.program_id(0)]
    left = length - step * tokens

    @pl.when(step == 0)
    def _():
        running_softmax.start(state)

    @pl.when(left > 0)
    def _():
        logits = scale * token_major.block_logits(q[0], keys, rows)
        running_softmax.keep(kept, logits, step)
        running_softmax.add_block(state, logits, lax.broadcasted_iota(jnp.int32, logits.shape, 1) < left)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        running_softmax.write_scores(scores, kept, state, length, group_reduction)
