"""selection_attention as a TPU kernel: decode_attention's pass over a compact buffer, masked entry by entry.

Differentiable: training attends a fixed selection. The backward pass is that of the XLA implementation, which computes
the softmax again; it is no step of decoding, so it has no kernel of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cache import KVCache, TokenMajor
from pallas_kernels.ops import running_softmax, token_major
from pallas_kernels.ops.selection_attention import xla

BLOCK_BYTES = 2 * 2**20  # the last block is computed when all bytes are there: shorter than decode_attention's


def selection_attention(
    q: Float[Array, "batch query_heads head_dim"],
    selection: KVCache,
    valid: Bool[Array, "batch heads budget"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool = False,
    group_reduction: str = "max",
    tokens: int | None = None,
) -> tuple[Float[Array, "batch query_heads head_dim"], None]:
    """As the operation; `tokens` per block, or as many as `BLOCK_BYTES` hold."""
    del group_reduction
    if return_scores:
        raise NotImplementedError("selection_attention has no kernel with scores")
    selection = token_major.require_token_major(selection, "selection_attention")
    tokens = tokens or token_major.block_tokens(selection, BLOCK_BYTES)
    return _attend(q, selection, valid, jnp.asarray(layer, jnp.int32), scale, tokens), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q: jax.Array, selection: TokenMajor, valid: jax.Array, layer: jax.Array, scale: float, tokens: int
) -> jax.Array:
    expanded = token_major.expand_queries(q, selection)
    batch, query_heads, lanes = expanded.shape
    blocks = pl.cdiv(selection.capacity, tokens)
    block = jax.ShapeDtypeStruct(token_major.block_shape(selection, tokens), selection.dtype)
    validity = jax.ShapeDtypeStruct((1, valid.shape[1], tokens), jnp.float32)
    row_block = token_major.row_of(expanded)
    of_row = pl.BlockSpec(row_block.shape, token_major.of_row)
    scratch = [running_softmax.running(query_heads), pltpu.VMEM((query_heads, lanes), jnp.float32)]
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            rows=selection.kv.shape[4],
            capacity=selection.capacity,
            mixed=selection.pack > 1 and valid.shape[1] > 1,
            scale=scale,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, blocks),
            in_specs=[
                of_row,
                pl.BlockSpec(block.shape, block_of_step),
                pl.BlockSpec(validity.shape, lambda row, step, layer: (row, 0, step)),
            ],
            out_specs=of_row,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(expanded.shape, q.dtype),
        name="selection_attention",
        compiler_params=token_major.compiler_params(
            "selection_attention", blocks=[block, validity, row_block, row_block], scratch=scratch
        ),
    )(layer.reshape(1), expanded, token_major.stored(selection), valid.astype(jnp.float32))
    return token_major.collect_heads(out, selection)


def _attend_forward(q, selection, valid, layer, scale, tokens):
    return _attend(q, selection, valid, layer, scale, tokens), (q, selection, valid, layer)


def _attend_backward(scale, tokens, inputs, cotangent):
    q, selection, valid, layer = inputs
    _, pull_back = jax.vjp(
        lambda q, selection: xla.selection_attention(q, selection, valid, layer=layer, scale=scale)[0], q, selection
    )
    return (*pull_back(cotangent), None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def block_of_step(row: jax.Array, step: jax.Array, layer: jax.Ref) -> tuple[jax.Array | int, ...]:
    """Index map of a block of entries, over a grid (batch, blocks)."""
    return layer[0], row, step, 0, 0, 0


def _kernel(layer, q, kv, valid, out, state, sums, *, rows, capacity, mixed, scale):
    step, tokens = pl.program_id(1), kv.shape[2]

    @pl.when(step == 0)
    def _():
        running_softmax.start(state)
        sums[...] = jnp.zeros_like(sums)

    # In a row of several kv heads a query meets the keys of the others with zeros, and 0 x NaN is NaN: an entry that is
    # valid for its own head may not be for them.
    logits = scale * token_major.block_logits(q[0], kv, rows, finite=mixed)
    heads, group = valid.shape[1], logits.shape[0] // valid.shape[1]
    visible = jnp.broadcast_to(valid[0][:, None, :], (heads, group, tokens)).reshape(logits.shape) > 0
    if capacity % tokens:
        visible &= step * tokens + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < capacity
    weights, older = running_softmax.add_block(state, logits, visible)
    sums[...] = older * sums[...] + token_major.block_sums(weights, kv, rows, capacity=capacity, first=step * tokens)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out[0] = (sums[...] * running_softmax.normaliser(state.total[:, :1])).astype(out.dtype)
