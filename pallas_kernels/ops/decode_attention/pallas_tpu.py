"""decode_attention as a TPU kernel: one pass over the slots in use, a block at a time, with an online softmax.

A grid step has a block of one row's tokens, keys and values as they lie in the cache, fetched while the step before
computes. Steps past a row's length do nothing: they name the block that is already there, so none is fetched.
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


def decode_attention(
    q: Float[Array, "batch query_heads head_dim"],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool,
    group_reduction: str,
    tokens: int | None = None,
) -> tuple[Float[Array, "batch query_heads head_dim"], Float[Array, "batch heads capacity"] | None]:
    """As the operation; `tokens` per block, or as many as `BLOCK_BYTES` hold."""
    cache = token_major.require_token_major(cache, "decode_attention")
    expanded = token_major.expand_queries(q, cache)
    batch, query_heads, lanes = expanded.shape
    tokens = tokens or token_major.block_tokens(cache, BLOCK_BYTES)
    blocks = pl.cdiv(cache.capacity, tokens)
    block = jax.ShapeDtypeStruct(token_major.block_shape(cache, tokens), cache.dtype)
    outputs = [jax.ShapeDtypeStruct(expanded.shape, q.dtype)]
    scratch = [running_softmax.running(query_heads), pltpu.VMEM((query_heads, lanes), jnp.float32)]
    if return_scores:
        heads = query_heads if group_reduction == PER_QUERY_HEAD else cache.kv_heads
        outputs.append(jax.ShapeDtypeStruct((batch, heads, cache.capacity), jnp.float32))
        scratch.append(running_softmax.kept_logits(query_heads, blocks, tokens))
    row_blocks = [token_major.row_of(output) for output in outputs]
    of_row = [pl.BlockSpec(row.shape, token_major.of_row) for row in row_blocks]

    out, *scores = pl.pallas_call(
        functools.partial(
            _kernel,
            rows=cache.kv.shape[4],
            capacity=cache.capacity,
            scale=scale,
            group_reduction=group_reduction if return_scores else None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, blocks),
            in_specs=[of_row[0], pl.BlockSpec(block.shape, functools.partial(token_major.block_in_use, tokens))],
            out_specs=of_row,
            scratch_shapes=scratch,
        ),
        out_shape=outputs,
        name="decode_attention",
        compiler_params=token_major.compiler_params(
            "decode_attention", blocks=[block, token_major.row_of(expanded), *row_blocks], scratch=scratch
        ),
    )(jnp.asarray(layer, jnp.int32).reshape(1), lengths.astype(jnp.int32), expanded, token_major.stored(cache))
    return token_major.collect_heads(out, cache), scores[0] if return_scores else None


def _kernel(layer, lengths, q, kv, out, *refs, rows, capacity, scale, group_reduction):
    scores, state, sums, kept = refs if group_reduction else (None, *refs, None)
    step, tokens = pl.program_id(1), kv.shape[2]
    length = lengths[pl.program_id(0)]
    left = length - step * tokens

    @pl.when(step == 0)
    def _():
        running_softmax.start(state)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(left > 0)
    def _():
        logits = scale * token_major.block_logits(q[0], kv, rows)
        if kept is not None:
            running_softmax.keep(kept, logits, step)
        visible = lax.broadcasted_iota(jnp.int32, logits.shape, 1) < left
        weights, older = running_softmax.add_block(state, logits, visible)
        sums[...] = older * sums[...] + token_major.block_sums(
            weights, kv, rows, capacity=capacity, first=step * tokens
        )

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out[0] = (sums[...] * running_softmax.normaliser(state.total[:, :1])).astype(out.dtype)
        if scores is not None and kept is not None:
            running_softmax.write_scores(scores, kept, state, length, group_reduction)
