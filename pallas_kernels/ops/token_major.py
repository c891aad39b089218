"""Reading a `TokenMajor` cache inside a TPU kernel: what the kernels of several operations share.

In the cache the heads of a token follow each other; a product with the keys of one row of heads needs the same row of
many tokens. A load from VMEM with a stride gathers exactly that, eight tokens at a time, at no cost; where two
bfloat16 rows share the 32-bit words of a sublane, a shift or a mask takes one of them apart. So no tokens and heads are
ever transposed, and nothing is computed twice.

Query heads stay in their own order. Query head h belongs to row h // heads, heads = query_heads / rows, and lies in the
lanes of its own kv head, with zeros in the others (`expand_queries`).
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt32

from pallas_kernels import dispatch
from pallas_kernels.cache import LANES, KVCache, TokenMajor

SUBLANES = 8
PIECE = 256  # tokens; the width of the newer matrix units
COMPILER_BYTES = 8 * 2**20  # for the values of a grid step that do not fit the registers


@runtime_checkable
class Sized(Protocol):
    """An array, its ShapeDtypeStruct or a reference."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def require_token_major(cache: KVCache, operation: str) -> TokenMajor:
    """The cache, if a TPU kernel can read it.

    Raises:
        NotImplementedError: another layout or, on TPU, a row that is not whole words of memory.
    """
    if not isinstance(cache, TokenMajor):
        raise NotImplementedError(f"{operation} on TPU needs a TokenMajor cache, got {type(cache).__name__}")
    if cache.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{operation} on TPU needs a bfloat16 or float32 cache, got {cache.dtype}")
    rows, lanes = cache.kv.shape[4:]
    if dispatch.platform() == "tpu":
        if lanes != LANES:
            raise NotImplementedError(
                f"{operation} on TPU needs rows of {LANES} lanes, got {lanes}: kv_heads={cache.kv_heads} of "
                f"head_dim={cache.head_dim}"
            )
        if _rows_per_word(cache.dtype) == 2 and rows % 2 and rows > 1:
            raise NotImplementedError(f"{operation} on TPU needs one row or an even number of them, got {rows}")
    return cache


def _rows_per_word(dtype: jnp.dtype) -> int:
    return 4 // dtype.itemsize


def expand_queries(
    q: Float[Array, "batch query_heads head_dim"], cache: TokenMajor
) -> Float[Array, "batch query_heads lanes"]:
    """Each query in the lanes of its kv head, zeros in the others, in the dtype of the cache."""
    q = q.astype(cache.dtype)
    segments = _segments(q.shape[1], cache)
    return jnp.concatenate([jnp.where(segments == segment, q, 0) for segment in range(cache.pack)], axis=-1)


def collect_heads(
    out: Float[Array, "batch query_heads lanes"], cache: TokenMajor
) -> Float[Array, "batch query_heads head_dim"]:
    """Of each query head's row the lanes of its kv head; the others hold its weights on other heads' values."""
    segments = _segments(out.shape[1], cache)
    apart = jnp.split(out, cache.pack, axis=-1)
    chosen = apart[0]
    for segment in range(1, cache.pack):
        chosen = jnp.where(segments == segment, apart[segment], chosen)
    return chosen


def _segments(query_heads: int, cache: TokenMajor) -> np.ndarray:
    """[1, query_heads, 1]: which piece of a row's lanes is the kv head's; a constant of the program."""
    group = query_heads // cache.kv_heads
    return (np.arange(query_heads) // group % cache.pack)[None, :, None]


def stored(cache: TokenMajor) -> jax.Array:
    """The cache as kernels take it: [layers, batch, capacity, parts, rows of a part, lanes], a view.

    Keys and values are two parts. One bfloat16 row of each, though, share their words: they are one part of two rows.
    """
    return cache.kv.reshape(*cache.kv.shape[:3], *_parts(cache))


def _parts(cache: TokenMajor) -> tuple[int, int, int]:
    parts, rows, lanes = cache.kv.shape[3:]
    return (1, 2, lanes) if rows == 1 and _rows_per_word(cache.dtype) == 2 else (parts, rows, lanes)


def block_shape(cache: TokenMajor, tokens: int, *, keys_only: bool = False) -> tuple[int, ...]:
    """Of a block of tokens of `stored(cache)`: with the keys alone, where they are a part of their own."""
    parts, rows, lanes = _parts(cache)
    return (1, 1, tokens, 1 if keys_only else parts, rows, lanes)


def block_tokens(cache: TokenMajor, block_bytes: int, *, keys_only: bool = False) -> int:
    """Tokens per block: as many as fit `block_bytes`, whole tiles of lanes, dividing the capacity if possible."""
    bytes_per_token = math.prod(block_shape(cache, 1, keys_only=keys_only)) * cache.dtype.itemsize
    most = max(block_bytes // bytes_per_token // LANES, 1) * LANES
    if cache.capacity <= most:
        return cache.capacity
    # A divisor leaves no block with an end past the cache; a small one would cost more than masking that end.
    divisors = [size for size in range(LANES, most + 1, LANES) if cache.capacity % size == 0 and 2 * size >= most]
    return max(divisors, default=most)


def reader(block: jax.Ref, some: slice, *, finite: bool = False) -> Callable[[int], jax.Array]:
    """Loads row r of heads of some tokens of a block [1, 1, tokens, parts, rows, lanes], as [tokens, lanes].

    Values follow the keys' rows. What is not finite is read as 0 on request. A reader loads words once, so it must be
    made where it is used: under the same condition.
    """
    _, _, tokens, parts, rows, lanes = block.shape
    count = some.stop - some.start

    def interpreted(row: int) -> jax.Array:  # the interpreter cannot read bfloat16 as words
        x = block[0, 0, some, row // rows, row % rows, :]
        return jnp.where(jnp.isfinite(x), x, 0) if finite else x

    if dispatch.platform() != "tpu":
        return interpreted

    per_word = _rows_per_word(block.dtype)
    stride = parts * rows // per_word

    @functools.cache
    def words(word_row: int) -> jax.Array:
        typed: Any = block  # as a reference to VMEM, which has views that a Ref in general has not
        flat = (typed.bitcast(jnp.uint32) if per_word == 2 else typed).reshape(tokens * stride, lanes)
        return flat[pl.ds(some.start * stride + word_row, count, stride if stride > 1 else None), :]

    def load(row: int) -> jax.Array:
        x = words(row // per_word)
        if per_word == 2:
            x = row_of_words(x, row)
        if finite:
            x = jnp.where(jnp.isfinite(x), x, 0)
        return x.astype(block.dtype)

    return load


def row_of_words(words: UInt32[Array, "tokens lanes"], row: int) -> Float[Array, "tokens lanes"]:
    """One of two bfloat16 rows that share words, as float32: the even row is the lower half of each word."""
    # A bfloat16 is the upper half of a float32.
    return lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000) if row % 2 else words << 16, jnp.float32)


def block_logits(
    q: Float[Array, "query_heads lanes"], block: jax.Ref, rows: int, *, finite: bool = False
) -> Float[Array, "query_heads tokens"]:
    """Products of every query head with the keys that it belongs to, of a block of tokens, float32."""
    pieces = [times_keys(q, reader(block, some, finite=finite), rows) for some in _pieces(block.shape[2])]
    return jnp.concatenate(pieces, axis=1)


def block_sums(
    weights: Float[Array, "query_heads tokens"], block: jax.Ref, rows: int, *, capacity: int, first: jax.Array
) -> Float[Array, "query_heads lanes"]:
    """Weighted sums of the values that a query head belongs to, of a block that begins with token `first`, float32.

    Where blocks do not divide the capacity, what the last one has past the end of the cache may be NaN, which a weight
    of zero does not remove; elsewhere values are finite.
    """
    tokens = block.shape[2]

    def piece(some: slice) -> jax.Array:
        load = reader(block, some)

        def load_values(row: int) -> jax.Array:
            values = load(rows + row)
            if capacity % tokens:
                token = first + some.start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
                values = jnp.where(token < capacity, values, jnp.zeros_like(values))
            return values

        return times_values(weights[:, some], load_values, rows)

    return functools.reduce(jnp.add, map(piece, _pieces(tokens)))


def _pieces(tokens: int) -> list[slice]:
    """What is worked on at a time: few enough that a word loaded for two rows stays in its register between them."""
    return [slice(first, min(first + PIECE, tokens)) for first in range(0, tokens, PIECE)]


def times_keys(
    q: Float[Array, "query_heads lanes"], load: Callable[[int], jax.Array], rows: int
) -> Float[Array, "query_heads tokens"]:
    """Products of every query head with the row that it belongs to, `load(row)` [tokens, lanes], float32."""

    def product(heads: slice, row: int) -> jax.Array:
        return _dot(q[heads], load(row), contract=1)

    return _by_rows(product, q.shape[0], rows)


def times_values(
    weights: Float[Array, "query_heads tokens"], load: Callable[[int], jax.Array], rows: int
) -> Float[Array, "query_heads lanes"]:
    """Sums of the row that a query head belongs to, weighted, float32; the weights are rounded to the row's dtype."""

    def product(heads: slice, row: int) -> jax.Array:
        values = load(row)
        return _dot(weights[heads].astype(values.dtype), values, contract=0)

    return _by_rows(product, weights.shape[0], rows)


def _by_rows(product: Callable[[slice, int], jax.Array], query_heads: int, rows: int) -> jax.Array:
    """product(heads, row) where the heads belong to the row, for all heads.

    Rows whose heads fill a tile only together are computed for all heads of the tile, of which each keeps its own:
    a product has the price of a whole tile anyway. Keeping is a choice and not a sum, so NaN does not spread.
    """
    heads = query_heads // rows
    together = SUBLANES // math.gcd(SUBLANES, heads)
    tiles = []
    for first in range(0, rows, together):
        last = min(first + together, rows)
        tile = slice(first * heads, last * heads)
        chosen = product(tile, first)
        head = lax.broadcasted_iota(jnp.int32, chosen.shape, 0)
        for row in range(first + 1, last):
            chosen = jnp.where(head < (row - first) * heads, chosen, product(tile, row))
        tiles.append(chosen)
    return jnp.concatenate(tiles, axis=0) if len(tiles) > 1 else tiles[0]


def _dot(x: jax.Array, y: jax.Array, contract: int) -> jax.Array:
    """x times y over the last axis of x and axis `contract` of y; float32 is not rounded to bfloat16 on the way."""
    precision = lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def of_row(row: jax.Array, step: jax.Array, *_: jax.Ref) -> tuple[jax.Array | int, ...]:
    """Index map, over a grid (batch, blocks), of what a row of the batch has once: [1, ..., ...]."""
    return row, 0, 0


def row_of(array: Sized) -> jax.ShapeDtypeStruct:
    """The block that `of_row` names."""
    return jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype)


def block_in_use(
    tokens: int, row: jax.Array, step: jax.Array, layer: jax.Ref, lengths: jax.Ref
) -> tuple[jax.Array | int, ...]:
    """Index map of a block of `tokens`, over a grid (batch, blocks): past a row's length its last block in use, again.

    A block that is there already is not fetched.
    """
    last = jnp.maximum(lengths[row] - 1, 0) // tokens
    return layer[0], row, jnp.minimum(step, last), 0, 0, 0


def compiler_params(operation: str, *, blocks: Iterable[Sized], scratch: Any) -> pltpu.CompilerParams:
    """For a grid (batch, blocks of a row): room in VMEM for its blocks, each twice, and for its scratch.

    Raises:
        NotImplementedError: the chip that the program is for has not that much.
    """
    limit = sum(2 * _bytes(x) for x in blocks) + sum(_bytes(x) for x in jax.tree.leaves(scratch)) + COMPILER_BYTES
    if dispatch.platform() == "tpu":
        available = pltpu.get_tpu_info().vmem_capacity_bytes
        if limit > available:
            raise NotImplementedError(
                f"{operation} on TPU needs {limit / 2**20:.0f} MiB of VMEM for these shapes and the chip has "
                f"{available / 2**20:.0f} MiB"
            )
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit, disable_bounds_checks=True
    )


def _bytes(x: Sized) -> int:
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
