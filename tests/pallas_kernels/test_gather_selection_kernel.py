"""The TPU kernel of gather_selection in the interpreter: chunks that overlap, both times for DMAs, its mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import from_heads, gather_selection, interpreted
from pallas_kernels.ops import fetch
from pallas_kernels.ops.gather_selection import pallas_tpu
from tests.pallas_kernels.arg_specs import generator, normal

TOKENS, BUDGET, CHUNK = 20, 11, 4  # three chunks, the last one beginning inside the second


def difference(dma_execution_mode: str, getkey) -> float:
    """The largest difference between the kernel, in chunks of `CHUNK`, and indexing; NaN if it has one."""
    k, v = (normal(getkey(), (2, 2, TOKENS, 64), "float32") for _ in range(2))
    random = generator(getkey())
    positions = jnp.asarray(random.integers(-1, TOKENS, (2, 2, BUDGET)), jnp.int32)
    cache = from_heads("token_major", k, v)
    parameters = pltpu.InterpretParams(detect_races=True, vector_clock_size=64, dma_execution_mode=dma_execution_mode)
    with interpreted(parameters):
        compact = gather_selection(cache, positions, cache.empty_like(capacity=BUDGET), implementation="pallas_tpu")
        jax.block_until_ready(compact)
    expected = gather_selection(cache, positions, cache.empty_like(capacity=BUDGET), implementation="reference")
    return max(
        float(np.max(np.abs(np.asarray(getattr(compact, part)(0)) - np.asarray(getattr(expected, part)(0)))))
        for part in ("keys", "values")
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "FETCHES", 2 * CHUNK)
    yield
    pltpu.reset_tpu_interpret_mode_state()  # a race leaves it behind


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
def test_chunks_make_no_difference(mode, getkey):
    assert difference(mode, getkey) == 0


def test_a_missing_wait_is_caught(monkeypatch, getkey):
    wait = fetch.wait
    monkeypatch.setattr(fetch, "wait", lambda x, semaphore: None if len(x.shape) == 6 else wait(x, semaphore))
    with pytest.raises(Exception, match=r"(?i)race"):
        difference("eager", getkey)


def test_a_slot_off_by_one_is_caught(monkeypatch, getkey):
    tokens_at = pallas_tpu.tokens_at
    monkeypatch.setattr(
        pallas_tpu, "tokens_at", lambda cache, slots, row: tokens_at(cache, jnp.minimum(slots + 1, TOKENS - 1), row)
    )
    assert difference("on_wait", getkey) > 0.1
