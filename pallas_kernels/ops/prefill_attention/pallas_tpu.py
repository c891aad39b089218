"""prefill_attention on TPU: flash attention of a chunk of queries over the token-major cache as it lies.

Splash attention, which causal_attention uses, wants contiguous keys head by head and a mask known when the program is
traced. Here the cache is a stack of layers with all heads of a token together, and where the chunk begins is known only
when the program runs: splash would need a copy of the layer, and a program for every start.

Grid: rows of the batch, blocks of queries, blocks of the cache up to the last slot that the chunk sees. A block of the
cache holds all kv heads, for memory is moved in tiles that do. It is first sorted by heads, then each row of heads is
attended by all queries that belong to it: sorting once serves a thousand queries or so.

Source of the online softmax: Milakov and Gimelshein, arXiv 1805.02867.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.cache import LANES, KVCache, TokenMajor
from pallas_kernels.ops import token_major

# Queries times query heads in a block, bfloat16: the state of each takes 1.5 KiB of VMEM, twice its q and output 1 KiB.
QUERY_ROWS = 8192
# Slots and bytes of a block of the cache, which is held twice as it comes and once sorted. (Blocks of 256 and of 1,024
# slots take a tenth and a twentieth more bundles per slot: scaling the sums once a block, and registers spilled.)
CACHE_SLOTS = 512
CACHE_BYTES = 2 * 2**20
VMEM_BYTES = 48 * 2**20  # of 64 MiB on the chips with least
# Stands for the logit of a slot that is not seen: finite, so that the difference of two is not NaN.
UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def prefill_attention(
    q: Float[Array, "batch query_heads chunk head_dim"],
    cache: KVCache,
    start: int | Int[Array, ""] | Int[Array, " batch"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
) -> Float[Array, "batch query_heads chunk head_dim"]:
    cache = token_major.require_token_major(cache, "prefill_attention")
    batch, query_heads, chunk, _ = q.shape
    block_q, block_kv = query_block(query_heads, chunk, cache.dtype.itemsize), cache_block(cache)

    # exp(x) is 2 ** (x log2(e)): with the factor in q, the kernel's weights are powers of two of the products.
    queries = _in_own_lanes((q * (scale * math.log2(math.e))).astype(cache.dtype), cache)
    queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, -chunk % block_q), (0, 0)))
    rows, heads, padded, lanes = queries.shape[1:]
    per_query = (rows, heads * block_q)

    start = jnp.asarray(start, jnp.int32)
    if start.ndim:
        raise NotImplementedError("prefill_attention needs one start for all rows")
    query_spec = pl.BlockSpec((1, rows, heads, block_q, lanes), lambda b, i, j, _: (b, 0, 0, i, 0))
    cache_spec = pl.BlockSpec(
        token_major.block_shape(cache, block_kv),
        functools.partial(_cache_index, block_q=block_q, block_kv=block_kv, chunk=chunk),
    )
    out = pl.pallas_call(
        functools.partial(_kernel, capacity=cache.capacity),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, padded // block_q, pl.cdiv(start + chunk, block_kv)),
            in_specs=[query_spec, cache_spec],
            out_specs=query_spec,
            scratch_shapes=[
                pltpu.VMEM((2, rows, block_kv, lanes), cache.dtype),
                pltpu.VMEM((*per_query, lanes), jnp.float32),
                pltpu.VMEM((*per_query, LANES), jnp.float32),
                pltpu.VMEM((*per_query, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        name="prefill_attention",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,
        ),
    )(jnp.stack([start, jnp.asarray(layer, jnp.int32)]), queries, token_major.stored(cache))
    return _from_own_lanes(out, cache)[:, :, :chunk]


def query_block(query_heads: int, chunk: int, itemsize: int) -> int:
    """Queries of each head in a block: whole tiles, and as many as there is room for or the chunk has."""
    tile = 32 // itemsize
    room = max(QUERY_ROWS * 2 // (itemsize * query_heads * tile), 1) * tile
    blocks = pl.cdiv(chunk, room)
    return pl.cdiv(chunk, blocks * tile) * tile


def cache_block(cache: TokenMajor) -> int:
    """Slots in a block of the cache: a multiple of the 128 lanes, or all there are."""
    return min(token_major.block_tokens(cache, CACHE_BYTES), CACHE_SLOTS)


def _in_own_lanes(
    q: Float[Array, "batch query_heads chunk head_dim"], cache: TokenMajor
) -> Float[Array, "batch rows heads chunk lanes"]:
    """By rows of the cache, and each query in the lanes of its own kv head; zeros in those of others in the row.

    A product with whole rows is then one with that kv head, at no cost: a matrix unit has as many columns as lanes.
    """
    batch, query_heads, chunk, head_dim = q.shape
    pack, rows = cache.pack, cache.kv_heads // cache.pack
    by_kv_head = q.reshape(batch, rows, pack, -1, chunk, 1, head_dim)
    own = jnp.eye(pack, dtype=bool).reshape(1, 1, pack, 1, 1, pack, 1)
    return jnp.where(own, by_kv_head, 0).reshape(batch, rows, query_heads // rows, chunk, pack * head_dim)


def _from_own_lanes(
    out: Float[Array, "batch rows heads chunk lanes"], cache: TokenMajor
) -> Float[Array, "batch query_heads chunk head_dim"]:
    """The opposite; the other lanes hold a query's weights on other heads' values."""
    batch, rows, heads, chunk, _ = out.shape
    by_lanes = out.reshape(batch, rows, cache.pack, -1, chunk, cache.pack, cache.head_dim)
    own = jnp.stack([by_lanes[:, :, i, :, :, i] for i in range(cache.pack)], axis=2)
    return own.reshape(batch, rows * heads, chunk, cache.head_dim)


def _cache_index(b, i, j, scalars, *, block_q: int, block_kv: int, chunk: int):
    """The block of the cache for a step: past the last that its queries see that one again, which is not fetched."""
    start, layer = scalars[0], scalars[1]
    last_slot = start + jnp.minimum((i + 1) * block_q, chunk) - 1
    return layer, b, jnp.minimum(j, lax.div(last_slot, block_kv)), 0, 0, 0


def _kernel(scalars, q_ref, cache_ref, o_ref, sorted_ref, out_ref, largest_ref, total_ref, *, capacity: int):
    i, j = pl.program_id(1), pl.program_id(2)
    block_q, block_kv = q_ref.shape[3], cache_ref.shape[2]
    first_query = scalars[0] + i * block_q  # as a slot
    first_slot = j * block_kv
    seen_by_some = first_slot < first_query + block_q
    seen_by_all = first_slot + block_kv <= first_query + 1
    state = (out_ref, largest_ref, total_ref)

    @pl.when(j == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        largest_ref[...] = jnp.full_like(largest_ref, UNSEEN)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(seen_by_some)
    def _():
        _sort_by_head(cache_ref, sorted_ref, capacity - first_slot if capacity % block_kv else None)

    @pl.when(seen_by_all)
    def _():
        _attend(q_ref, sorted_ref, *state, own_slot=None)

    @pl.when(seen_by_some & jnp.logical_not(seen_by_all))
    def _():
        _attend(q_ref, sorted_ref, *state, own_slot=first_query - first_slot)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        out = out_ref[...] / _over_lanes(total_ref[...], out_ref.shape[-1])
        o_ref[...] = out.astype(o_ref.dtype).reshape(o_ref.shape)


def _sort_by_head(cache_ref, sorted_ref, slots: Array | None) -> None:
    """A block of the cache to [keys and values, rows, block_kv, lanes]; only so many of its `slots` exist, if given."""
    rows, block_kv = sorted_ref.shape[1:3]
    load = token_major.reader(cache_ref, slice(0, block_kv))
    for row in range(rows):
        sorted_ref[0, row] = load(row)
        values = load(rows + row)
        if slots is not None:
            # Past the end of the cache may be NaN, and NaN times a weight of 0 is NaN. Keys there are never seen.
            exists = lax.broadcasted_iota(jnp.int32, values.shape, 0) < slots
            values = jnp.where(exists, values, jnp.zeros_like(values))
        sorted_ref[1, row] = values


def _attend(q_ref, sorted_ref, out_ref, largest_ref, total_ref, *, own_slot: Array | None) -> None:
    """A block of the cache, row by row. Query c sees slots 0 to `own_slot + c` of the block; all of them if None."""
    rows, heads, block_q, lanes = q_ref.shape[1:]
    block_kv = sorted_ref.shape[2]
    precision = lax.Precision.HIGHEST if sorted_ref.dtype == jnp.float32 else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    @pl.loop(0, rows)
    def _(row):
        queries = q_ref[0, row].reshape(heads * block_q, lanes)
        logits = dot(queries, sorted_ref[0, row], (((1,), (1,)), ((), ())))
        if own_slot is not None:
            shape = (heads, block_q, block_kv)
            visible = lax.broadcasted_iota(jnp.int32, shape, 2) <= own_slot + lax.broadcasted_iota(jnp.int32, shape, 1)
            logits = jnp.where(visible, logits.reshape(shape), UNSEEN).reshape(logits.shape)
        before = largest_ref[row]
        largest = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp2(logits - _over_lanes(largest, block_kv))
        older = jnp.exp2(before - largest)
        sums = dot(weights.astype(sorted_ref.dtype), sorted_ref[1, row], (((1,), (0,)), ((), ())))
        largest_ref[row] = largest
        total_ref[row] = older * total_ref[row] + jnp.sum(weights, axis=1, keepdims=True)
        out_ref[row] = _over_lanes(older, lanes) * out_ref[row] + sums


def _over_lanes(per_query: Array, width: int) -> Array:
    """A number per query, equal in all 128 lanes, over `width` lanes."""
    repeats = pl.cdiv(width, LANES)
    return jnp.tile(per_query, (1,) * (per_query.ndim - 1) + (repeats,))[..., :width]
