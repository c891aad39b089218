"""What the dump does not tell: how often the loops of a kernel run whose trip counts it computes itself.

By the kernel's name, for a batch of the shapes in `programs`, whose slots are all in use; in the order of the loops in
the code (`bundles.cost`). A kernel with such a loop that is missing here is reported as unknown.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from pallas_kernels.cache import LANES
from pallas_kernels.ops.prefill_attention.pallas_tpu import CACHE_SLOTS, query_block
from tpu_check.programs import BUDGET, DTYPE, MODELS, PREFILL, TOKENS


def _scores(batch: int) -> Sequence[float]:
    """After a row's last block, tile by tile: scores from logits, and none to fill up with zeros."""
    return batch * TOKENS / LANES, 0


def _sort(batch: int) -> Sequence[float]:
    """For the 8 kv heads of a row: every register of slots looks for its keys in 2 groups of slots (they stand in order,
    and are taken to be spread evenly), then a bitonic network's 1 + 2 + .. + 12 steps."""
    bits = (BUDGET - 1).bit_length()
    return batch * 2 * BUDGET / LANES, batch * bits * (bits + 1) / 2


def _prefill(batch: int) -> Sequence[float]:
    """The grid itself, which ends where the chunk does."""
    block = query_block(MODELS["8B"].query_heads, PREFILL, jnp.dtype(DTYPE).itemsize)
    return (batch * (PREFILL / block) * (TOKENS / CACHE_SLOTS),)


RUNS: Mapping[str, Callable[[int], Sequence[float]]] = {
    "decode_attention": _scores,
    "token_scores": _scores,
    "select_sort": _sort,
    "prefill_attention": _prefill,
}
