"""verify_attention as a TPU kernel: decode_attention's walk over the slots in use, with the queries of all steps.

All steps of all query heads of a kv head are one group of queries; each sees the slots up to its own. Where scores are
asked for, they are made at the end of a row (`tpu_scores`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cache import LANES, KVCache, TokenMajor
from pallas_kernels.checks import PER_QUERY_HEAD
from pallas_kernels.ops import running_softmax, token_major
from pallas_kernels.ops.verify_attention import tpu_queries, tpu_scores
from pallas_kernels.ops.verify_attention.tpu_queries import Queries

BLOCK_BYTES = 4 * 2**20  # of keys and values: long enough to hide a step's fixed costs, short beside the VMEM
LOGIT_BYTES = 3 * 2**19  # of a block
SHARE_OF_VMEM = 7 / 8  # that the kernel may take; XLA has uses for some of it


def verify_attention(
    q: Float[Array, "batch query_heads steps head_dim"],
    cache: KVCache,
    start: Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    return_scores: bool,
    group_reduction: str,
    tokens: int | None = None,
    kept: int | None = None,
) -> tuple[Float[Array, "batch query_heads steps head_dim"], Float[Array, "batch heads steps capacity"] | None]:
    """As the operation; `tokens` per block, `kept` blocks whose logits stay: as many of either as there is room for."""
    cache = token_major.require_token_major(cache, "verify_attention")
    batch, query_heads, steps, _ = q.shape
    queries = tpu_queries.arrange(cache, query_heads, steps)
    expanded = tpu_queries.expand(q, queries, cache)
    tokens = tokens or block_tokens(cache, queries)
    blocks = pl.cdiv(cache.capacity, tokens)
    heads = (query_heads if group_reduction == PER_QUERY_HEAD else cache.kv_heads) if return_scores else 0
    if kept is None:
        kept = kept_blocks(cache, queries, heads, q.dtype, tokens)
    outputs = [jax.ShapeDtypeStruct(expanded.shape, q.dtype)]
    if return_scores:
        outputs.append(jax.ShapeDtypeStruct((batch, steps, heads, blocks * tokens), jnp.float32))
    scratch = scratch_shapes(cache, queries, heads, tokens, min(kept + 1, blocks))
    of_row = pl.BlockSpec((1, *expanded.shape[1:]), token_major.of_row)
    in_place = pl.BlockSpec(memory_space=pl.ANY)

    def in_use(row: jax.Array, block: jax.Array, layer: jax.Ref, ends: jax.Ref, starts: jax.Ref):
        return token_major.block_in_use(tokens, row, block, layer, ends)

    start = start.astype(jnp.int32)
    out, *scores = pl.pallas_call(
        functools.partial(
            _kernel,
            queries=queries,
            rows=cache.kv.shape[4],
            capacity=cache.capacity,
            scale=scale,
            kept=kept,
            group_reduction=group_reduction,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, blocks),
            in_specs=[of_row, pl.BlockSpec(token_major.block_shape(cache, tokens), in_use), in_place],
            out_specs=[of_row, in_place][: len(outputs)],
            scratch_shapes=scratch,
        ),
        out_shape=outputs,
        name="verify_attention",
        compiler_params=compiler_params(cache, queries, q.dtype, tokens, scratch),
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        jnp.minimum(start + steps, cache.capacity),
        start,
        expanded,
        token_major.stored(cache),
        token_major.stored(cache),
    )
    # Users have the steps first, as the kernel writes them: of the two exchanges nothing is left in the program.
    found = scores[0][..., : cache.capacity].swapaxes(1, 2) if return_scores else None
    return tpu_queries.collect(out, queries, cache), found


def block_tokens(cache: TokenMajor, queries: Queries) -> int:
    """Tokens per block, of which the logits have to fit, too."""
    per_token = math.prod(token_major.block_shape(cache, 1)) * cache.dtype.itemsize
    return token_major.block_tokens(cache, min(BLOCK_BYTES, LOGIT_BYTES // (4 * queries.number) * per_token))


def kept_blocks(
    cache: TokenMajor, queries: Queries, heads: int, dtype: jnp.dtype, tokens: int, vmem: int | None = None
) -> int:
    """Of how many blocks the logits stay until the end of a row for the scores of `heads`: as many as `vmem` bytes have
    room for beside all else, or the chip that the program is for. None without scores, all in the interpreter."""
    if vmem is None:
        vmem = pltpu.get_tpu_info().vmem_capacity_bytes if dispatch.platform() == "tpu" else 2**62
    blocks, one = pl.cdiv(cache.capacity, tokens), 4 * queries.number * pl.cdiv(tokens, LANES) * LANES
    scratch = scratch_shapes(cache, queries, heads, tokens, 1)
    taken = compiler_params(cache, queries, dtype, tokens, scratch).vmem_limit_bytes or 0
    more = max(int(SHARE_OF_VMEM * vmem) - taken, 0) // one
    return 0 if not heads else more if more < blocks - 1 else blocks


def scratch_shapes(cache: TokenMajor, queries: Queries, heads: int, tokens: int, places: int) -> list[Any]:
    """With room for the logits of so many blocks; and for scores, if any `heads` are to have some."""
    found = [
        running_softmax.running(queries.number),
        pltpu.VMEM((queries.number, cache.pack * cache.head_dim), jnp.float32),
        running_softmax.kept_logits(queries.number, places, tokens),
    ]
    if heads:
        keys = token_major.block_shape(cache, tokens, keys_only=True)
        found.append(tpu_scores.scratch(queries.steps, heads, tokens, keys, cache.dtype))
    return found


def compiler_params(
    cache: TokenMajor, queries: Queries, dtype: jnp.dtype, tokens: int, scratch: list[Any]
) -> pltpu.CompilerParams:
    of_queries = (1, queries.number, cache.pack * cache.head_dim)
    blocks = [
        jax.ShapeDtypeStruct(token_major.block_shape(cache, tokens), cache.dtype),
        jax.ShapeDtypeStruct(of_queries, cache.dtype),
        jax.ShapeDtypeStruct(of_queries, dtype),
    ]
    in_vmem = [x for x in jax.tree.leaves(scratch) if x.memory_space == pltpu.VMEM]  # semaphores are elsewhere
    return token_major.compiler_params("verify_attention", blocks=blocks, scratch=in_vmem)


def _kernel(layer, ends, starts, q, kv, cache, out, *refs, queries, rows, capacity, scale, kept, group_reduction):
    scores: Any
    held: Any
    scores, state, sums, logits, held = refs if len(refs) == 5 else (None, *refs, None)
    row, this, tokens = pl.program_id(0), pl.program_id(1), kv.shape[2]

    @pl.when(this == 0)
    def _():
        running_softmax.start(state)
        sums[...] = jnp.zeros_like(sums)

    def take_logits(keys: Any, block: jax.Array, place: jax.Array) -> None:
        found = scale * token_major.block_logits(q[0], keys, rows)
        first = block * tokens
        tpu_queries.keep(logits, found, place, queries, first_own=starts[row] - first, last=capacity - 1 - first)

    @pl.when(this * tokens < ends[row])
    def _():
        place = jnp.minimum(this, kept)
        take_logits(kv, this, place)
        found = tpu_queries.kept(logits, place, tokens)
        weights, older = running_softmax.add_block(state, found, jnp.ones(found.shape, bool))
        added = token_major.block_sums(weights, kv, rows, capacity=capacity, first=this * tokens)
        sums[...] = older * sums[...] + added

    def key_copy(block: jax.Array, buffer: int, act: Callable[[Any], None]) -> None:
        """`act` on the copy of a block's keys; past the end of the row, of its last block's."""
        _, _, index, *_ = token_major.block_in_use(tokens, row, block, layer, ends)
        keys = held.keys[buffer]
        whole, rest = divmod(capacity, tokens)

        def of(size: int) -> None:
            source = cache.at[layer[0], row, pl.ds(index * tokens, size), pl.ds(0, keys.shape[3])]
            act(pltpu.make_async_copy(source, keys.at[0, 0, pl.ds(0, size)], held.keys_came.at[buffer]))

        pl.when(index < whole)(lambda: of(tokens))
        if rest:
            pl.when(index == whole)(lambda: of(rest))

    @pl.when(this == pl.num_programs(1) - 1)
    def _():
        out[0] = (sums[...] * running_softmax.normaliser(state.total[:, :1])).astype(out.dtype)
        if scores is not None:
            tpu_scores.write(
                scores,
                held,
                logits,
                state,
                queries,
                row=row,
                end=ends[row],
                kept=kept,
                group_reduction=group_reduction,
                key_copy=key_copy,
                take_logits=take_logits,
            )
