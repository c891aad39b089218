"""Taking bfloat16 rows apart, which only TPUs do in kernels: the interpreter has no words of two rows in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpreted
from pallas_kernels.ops import token_major
from tests.pallas_kernels.arg_specs import normal


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_of_words_is_every_other_row(row, getkey):
    """Against the packing that JAX states for TPU registers, which its interpreter follows (`pltpu.bitcast`)."""
    rows = normal(getkey(), (16, 128), "bfloat16")

    def kernel(rows, words):
        words[...] = pltpu.bitcast(rows[...], jnp.uint32)

    with interpreted():
        words = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.uint32))(rows)
    expected = np.asarray(rows, np.float32)[row::2]
    np.testing.assert_array_equal(token_major.row_of_words(words, row), expected)
