"""Named shapes that every implementation of every operation is walked over, and arguments made from them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels import KVCache, from_heads, interpreted
from pallas_kernels.cache import Layout

GetKey = Callable[[], jax.Array]

# Absolute and relative, by the dtype of the cache: float32 differs by the order of sums, bfloat16 by the
# rounding of softmax weights and of the result (8 bits).
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}


@dataclass(frozen=True)
class ArgSpec:
    """Shapes of one query step over a ragged cache."""

    name: str
    kv_heads: int
    group: int
    head_dim: int
    dtype: str
    tokens: int
    lengths: tuple[int, ...]  # one per row; 0 is an empty row

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


ARG_SPECS = (
    ArgSpec("full_mha_64_float32", 2, 1, 64, "float32", tokens=24, lengths=(24, 24)),
    ArgSpec("ragged_gqa2_64_float32", 2, 2, 64, "float32", tokens=33, lengths=(17, 33, 0, 1)),
    ArgSpec("ragged_gqa4_16_float32", 3, 4, 16, "float32", tokens=40, lengths=(40, 0, 7)),
    ArgSpec("one_slot_gqa4_16_float32", 1, 4, 16, "float32", tokens=1, lengths=(1, 0)),
    ArgSpec("ragged_gqa2_16_bfloat16", 2, 2, 16, "bfloat16", tokens=33, lengths=(1, 32, 0)),
    ArgSpec("ragged_gqa4_64_bfloat16", 2, 4, 64, "bfloat16", tokens=40, lengths=(39, 5)),
    ArgSpec("empty_mha_16_bfloat16", 2, 1, 16, "bfloat16", tokens=8, lengths=(0, 0)),
)


# Every implementation with every layout of the cache that it takes.
IMPLEMENTATIONS_AND_LAYOUTS: tuple[tuple[str, Layout], ...] = (
    ("reference", "head_major"),
    ("xla", "head_major"),
    ("xla", "token_major"),
    ("pallas_tpu", "token_major"),
)

# Kernels run in the interpreter: with races, memory never written and reads out of bounds as errors.
INTERPRETER = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")

LAYERS, LAYER = 3, 1  # the caches of the grid: the layer in use, between two that must not be read


class CacheArguments(NamedTuple):
    """One query step over a cache: clean, and with padding that must not matter."""

    q: jax.Array  # [batch, query_heads, head_dim]
    k: jax.Array  # [batch, kv_heads, tokens, head_dim], zeros in padding
    v: jax.Array
    k_poisoned: jax.Array  # NaN in padding
    v_poisoned: jax.Array  # huge in padding
    lengths: jax.Array  # [batch]

    def cache(self, layout: Layout = "head_major") -> KVCache:
        return stacked(layout, self.k, self.v)

    def poisoned(self, layout: Layout) -> KVCache:
        return stacked(layout, self.k_poisoned, self.v_poisoned)


def stacked(layout: Layout, k: jax.Array, v: jax.Array) -> KVCache:
    """A cache whose layer `LAYER` holds k and v; the other layers hold NaN."""
    one = from_heads(layout, k, v)

    def stack(layer: jax.Array) -> jax.Array:
        nothing = jnp.full_like(layer, jnp.nan)
        return jnp.concatenate([nothing] * LAYER + [layer] + [nothing] * (LAYERS - LAYER - 1))

    return jax.tree.map(stack, one)


def cache_arguments(spec: ArgSpec, getkey: GetKey) -> CacheArguments:
    """Random arguments, every one from a key of its own.

    Padding values are poisoned with a huge number, not with NaN: they are multiplied by a weight that is
    exactly 0, and 0 x NaN is NaN. Guarding against that takes a `where` over v, which writes a copy of the
    cache at every step; the contract asks for finite values instead.
    """
    cache_shape = (spec.batch, spec.kv_heads, spec.tokens, spec.head_dim)
    in_use = (np.arange(spec.tokens) < np.array(spec.lengths)[:, None])[:, None, :, None]
    # Queries of this size make logits of several units: a softmax that is neither flat nor a single slot.
    q = 2 * normal(getkey(), (spec.batch, spec.kv_heads * spec.group, spec.head_dim), spec.dtype)
    k = normal(getkey(), cache_shape, spec.dtype)
    v = normal(getkey(), cache_shape, spec.dtype)
    return CacheArguments(
        q=q,
        k=masked(in_use, k, 0),
        v=masked(in_use, v, 0),
        k_poisoned=masked(in_use, k, np.nan),
        v_poisoned=masked(in_use, v, 1e30),
        lengths=jnp.array(spec.lengths, jnp.int32),
    )


def normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Standard normal numbers, drawn by numpy: `jax.random.normal` compiles for a second for every shape."""
    return jnp.asarray(generator(key).standard_normal(shape), dtype)


def generator(key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def masked(keep: np.ndarray, array: jax.Array, otherwise: float) -> jax.Array:
    """`array` where `keep`, a constant elsewhere, in the dtype of `array`."""
    return jnp.asarray(np.where(keep, np.asarray(array, np.float32), otherwise), array.dtype)


@functools.cache
def jitted(operation: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`operation` with `options` bound, jitted: one object per choice, so that tests share its programs."""
    program = jax.jit(functools.partial(operation, **options))
    if options.get("implementation") != "pallas_tpu":
        return program

    def run_interpreted(*args: Any, **kwargs: Any) -> Any:
        with interpreted(INTERPRETER):
            return jax.block_until_ready(program(*args, **kwargs))

    return run_interpreted


def assert_close(actual: jax.Array, expected: jax.Array, tolerance: float) -> None:
    """Same shape, same dtype, and values within `tolerance`, absolute and relative."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), np.asarray(expected, np.float32), atol=tolerance, rtol=tolerance
    )
