"""Activations times weights."""

import math

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dispatch import alone_on_cpu

PARTS = 4  # of a matrix; float32 on two cores, 0.3 GB of matrices: 30 GB/s in four parts, 20 in two, 17 in one
LARGE = 1 << 20  # bytes


def times(
    x: Float[Array, "*rows inner"], weight: Float[Array, "..."], dtype: DTypeLike | None = None
) -> Float[Array, "*rows outer"]:
    """`x` times a weight of `inner` × `outer` elements, however many axes these are; summed and given as `dtype`, that
    of `x` if there is none."""
    # As one plain matrix product: an einsum straight to several outer axes makes XLA transpose a copy of the weight at
    # every decode step instead of the small result.
    inner = x.shape[-1]
    matrix, dtype = weight.reshape(inner, -1).astype(x.dtype), x.dtype if dtype is None else dtype
    if alone_on_cpu() and math.prod(x.shape[:-1]) == 1 and matrix.nbytes >= LARGE and inner % PARTS == 0:
        # A product of one row with a matrix runs on one core; several of them run on all.
        rows, matrices = x.reshape(PARTS, -1), matrix.reshape(PARTS, inner // PARTS, -1)
        parts = jnp.einsum("pi,pio->po", rows, matrices, preferred_element_type=jnp.float32)
        return jnp.sum(parts, axis=0).reshape(*x.shape[:-1], -1).astype(dtype)
    return jnp.matmul(x, matrix, preferred_element_type=dtype)
