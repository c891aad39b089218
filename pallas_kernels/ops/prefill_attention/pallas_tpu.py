"""prefill_attention on TPU: flash attention of a chunk of queries over the token-major cache as it lies.

Splash attention, which causal_attention uses, wants contiguous keys head by head and a mask known when the program is
traced. Here the cache is a stack of layers with all heads of a token together, and the chunk begins at a slot that is
known only when the program runs: splash would need a copy of the layer, and a program for every start.

Grid: rows of the batch, blocks of queries, blocks of the cache up to the last slot that the chunk sees. A block of
the cache holds all kv heads, because memory is moved in tiles that do; inside, the block is first sorted by heads, then
each head is attended by all queries of its group, so that sorting is paid once for many products.

Source of the online softmax: Milakov and Gimelshein, arXiv 1805.02867.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import LANES, KVCache, TokenMajor

# Query rows (heads x tokens) of a block: what VMEM has room for on the chips with 64 MiB of it.
QUERY_ROWS = 8192
# Bytes of a block of the cache, which is held twice as it comes and once sorted.
KV_BYTES = 2 << 20
VMEM_LIMIT = 48 << 20
# Stands for the logit of a slot that is not seen: finite, so that the difference of two is not NaN.
UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def prefill_attention(
    q: Float[Array, "batch query_heads chunk head_dim"],
    cache: KVCache,
    start: int | Int[Array, ""],
    *,
    layer: int | Int[Array, ""],
    scale: float,
) -> Float[Array, "batch query_heads chunk head_dim"]:
    if not isinstance(cache, TokenMajor):
        raise NotImplementedError(f"needs a TokenMajor cache, got {type(cache).__name__}")
    batch, query_heads, chunk, head_dim = q.shape
    capacity, rows, lanes = cache.capacity, *cache.kv.shape[4:]
    pack, group = cache.pack, query_heads // cache.kv_heads
    block_q = query_block(query_heads, chunk, cache.dtype.itemsize)
    block_kv = cache_block(capacity, rows, lanes, cache.dtype.itemsize)

    # exp(x) is 2 ** (x log2(e)): with the factor in q, the kernel's weights are powers of two of the products.
    queries = (q * (scale * math.log2(math.e))).astype(cache.dtype)
    queries = _in_own_lanes(queries, rows, pack)
    queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, -chunk % block_q), (0, 0)))
    heads_per_row = pack * group
    per_query = (rows, heads_per_row * block_q)

    start = jnp.asarray(start, jnp.int32)
    scalars = jnp.stack([start, jnp.asarray(layer, jnp.int32)])
    seen = pl.cdiv(start + chunk, block_kv)  # blocks of the cache that any query sees
    query_spec = pl.BlockSpec((None, rows, heads_per_row, block_q, lanes), lambda b, i, j, _: (b, 0, 0, i, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, chunk=chunk, capacity=capacity),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, queries.shape[3] // block_q, seen),
            in_specs=[
                query_spec,
                pl.BlockSpec(
                    (None, None, block_kv, 2, rows, lanes),
                    functools.partial(_cache_index, block_q=block_q, block_kv=block_kv, chunk=chunk),
                ),
            ],
            out_specs=query_spec,
            scratch_shapes=[
                pltpu.VMEM((2, rows, block_kv, lanes), cache.dtype),
                pltpu.VMEM((*per_query, lanes), jnp.float32),
                pltpu.VMEM((*per_query, LANES), jnp.float32),
                pltpu.VMEM((*per_query, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="prefill_attention",
    )(scalars, queries, cache.kv)
    return _from_own_lanes(out, pack)[:, :, :chunk]


def query_block(query_heads: int, chunk: int, itemsize: int) -> int:
    """Queries of each head in a block: whole tiles, and as many as there is room for or the chunk has."""
    tile = 32 // itemsize
    room = max(tile, QUERY_ROWS * 2 // (itemsize * query_heads) // tile * tile)
    blocks = pl.cdiv(chunk, room)
    return pl.cdiv(chunk, blocks * tile) * tile


def cache_block(capacity: int, rows: int, lanes: int, itemsize: int) -> int:
    """Slots in a block of the cache: a multiple of the 128 lanes, or all there are."""
    room = KV_BYTES // (2 * rows * lanes * itemsize)
    return min(max(LANES, min(room, 1024) // LANES * LANES), capacity)


def _in_own_lanes(
    q: Float[Array, "batch query_heads chunk head_dim"], rows: int, pack: int
) -> Float[Array, "batch {rows} heads_per_row chunk lanes"]:
    """Each query in the lanes where the cache has its kv head, zeros in those of the heads that share the row.

    A product with a whole row of the cache is then one with that kv head alone, at no cost: a matrix unit is 128 wide.
    """
    batch, _, chunk, head_dim = q.shape
    by_head = q.reshape(batch, rows, pack, -1, chunk, 1, head_dim)
    own = jnp.eye(pack, dtype=bool).reshape(1, 1, pack, 1, 1, pack, 1)
    return jnp.where(own, by_head, 0).reshape(batch, rows, -1, chunk, pack * head_dim)


def _from_own_lanes(
    out: Float[Array, "batch rows heads_per_row chunk lanes"], pack: int
) -> Float[Array, "batch query_heads chunk head_dim"]:
    batch, rows, heads_per_row, chunk, lanes = out.shape
    by_head = out.reshape(batch, rows, pack, heads_per_row // pack, chunk, pack, lanes // pack)
    own = jnp.stack([by_head[:, :, i, :, :, i] for i in range(pack)], axis=2)
    return own.reshape(batch, rows * heads_per_row, chunk, lanes // pack)


def _cache_index(
    b: Array, i: Array, j: Array, scalars: Array, *, block_q: int, block_kv: int, chunk: int
) -> tuple[Array | int, ...]:
    """The block of the cache for a step: past the last one that its queries see, that one again, which fetches none."""
    start, layer = scalars[0], scalars[1]
    last_seen = start + jnp.minimum((i + 1) * block_q, chunk) - 1
    return layer, b, jnp.minimum(j, last_seen // block_kv), 0, 0, 0


def _kernel(scalars, q_ref, kv_ref, o_ref, sorted_ref, out_ref, largest_ref, total_ref, *, chunk, capacity):
    i, j = pl.program_id(1), pl.program_id(2)
    block_q, block_kv = q_ref.shape[2], kv_ref.shape[0]
    first_query = scalars[0] + i * block_q  # as a slot
    first_slot = j * block_kv

    @pl.when(j == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        largest_ref[...] = jnp.full_like(largest_ref, UNSEEN)
        total_ref[...] = jnp.zeros_like(total_ref)

    state = (out_ref, largest_ref, total_ref)

    @pl.when(first_slot < first_query + block_q)
    def _():
        _sort_by_head(kv_ref, sorted_ref, capacity - first_slot)

    seen_by_all = first_slot + block_kv <= first_query + 1

    @pl.when(seen_by_all)
    def _():
        _attend(q_ref, sorted_ref, *state, None)

    @pl.when(jnp.logical_not(seen_by_all) & (first_slot < first_query + block_q))
    def _():
        _attend(q_ref, sorted_ref, *state, first_query - first_slot)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        out = out_ref[...] / _spread(total_ref[...], out_ref.shape[-1])
        o_ref[...] = out.astype(o_ref.dtype).reshape(o_ref.shape)


def _sort_by_head(kv_ref, sorted_ref, slots_left):
    for part in range(2):
        block = kv_ref[:, part]
        sorted_ref[part] = jnp.swapaxes(block, 0, 1)


def _attend(q_ref, sorted_ref, out_ref, largest_ref, total_ref, own_slot):
    rows, heads, block_q, lanes = q_ref.shape
    block_kv = sorted_ref.shape[2]
    precision = lax.Precision.HIGHEST if sorted_ref.dtype == jnp.float32 else None

    def visit(row, _):
        queries = q_ref[row].reshape(heads * block_q, lanes)
        logits = lax.dot_general(
            queries,
            sorted_ref[0, row],
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if own_slot is not None:
            shape = (heads, block_q, block_kv)
            visible = lax.broadcasted_iota(jnp.int32, shape, 2) <= own_slot + lax.broadcasted_iota(jnp.int32, shape, 1)
            logits = jnp.where(visible, logits.reshape(shape), UNSEEN).reshape(logits.shape)
        previous = largest_ref[row]
        largest = jnp.maximum(previous, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp2(logits - _spread(largest, block_kv))
        decay = jnp.exp2(previous - largest)
        largest_ref[row] = largest
        total_ref[row] = decay * total_ref[row] + jnp.sum(weights, axis=1, keepdims=True)
        out_ref[row] = _spread(decay, lanes) * out_ref[row] + jnp.dot(
            weights.astype(sorted_ref.dtype), sorted_ref[1, row], precision=precision, preferred_element_type=jnp.float32
        )

    lax.fori_loop(0, rows, visit, None)


def _spread(per_query: Array, width: int) -> Array:
    """A number per query, which fills 128 lanes, over `width` lanes."""
    repeats = pl.cdiv(width, per_query.shape[-1])
    return jnp.tile(per_query, (1,) * (per_query.ndim - 1) + (repeats,))[..., :width]
