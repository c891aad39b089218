"""What the dump does not tell: how often the loops of a kernel run whose trip counts it computes itself, or that are
skipped most of the time.

By the kernel's name, for a batch of the shapes in `programs`, whose slots are all in use; in the order of the loops in
the code, None for what the code tells (`bundles.cost`). A kernel that computes a trip count and is missing here, or has
another number of loops, is reported as unknown.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from pallas_kernels.cache import LANES
from pallas_kernels.ops.prefill_attention.pallas_tpu import CACHE_SLOTS, query_block
from pallas_kernels.ops.running_softmax import TILES_TOGETHER
from pallas_kernels.ops.select_tokens.tpu_threshold import CHUNK, GROUP, WORD
from tpu_check.programs import BUDGET, DTYPE, MODELS, PREFILL, TOKENS

type Runs = Sequence[float | None]


def _scores(batch: int) -> Runs:
    """After a row's last block, some tiles at a time: scores from logits, and none to fill up with zeros."""
    return batch * TOKENS / (LANES * TILES_TOGETHER), 0


def _threshold(batch: int) -> Runs:
    """For the 8 kv heads of a row: bit planes at every grid step; the search only at a row's last one. It passes over
    the words of all slots first to begin, then for each digit of two bits but the last, for the last, and to end."""
    passes = TOKENS // GROUP // CHUNK
    planes = WORD + (TOKENS - 1).bit_length() + 1  # of the key and of the slot, an even number
    digits = batch * (planes // 2 - 1)
    return None, batch * passes, digits, digits * passes, batch * passes, batch * passes


def _sort(batch: int) -> Runs:
    """For the 8 kv heads of a row: each register of slots looks for its keys in 2 groups of slots (they stand in order,
    and are taken to be spread evenly); then a bitonic network, where distance 2^d is compared in bits - d steps, among
    registers or, from 2^5 on, among lanes, in 2 pieces."""
    registers, bits = BUDGET // LANES, (BUDGET - 1).bit_length()
    steps = [batch * (bits - distance) for distance in range(bits)]
    within = registers.bit_length() - 1
    fetch = (batch * registers, batch * registers * 2)
    network = (batch * bits, sum(steps), *(2 * step for step in steps[:within]), 2 * sum(steps[within:]))
    return *fetch, *network


def _gather(batch: int) -> Runs:
    """Chunks of entries; in a chunk, and again after the last one, the entries that are empty: none in a full list."""
    return None, 0, 0


def _prefill(batch: int) -> Runs:
    """The grid itself, which ends where the chunk does, and in it the 8 rows of a block of the cache: one that all
    queries see, or one that only some do, the last of each block of queries."""
    queries = PREFILL / query_block(MODELS["8B"].query_heads, PREFILL, jnp.dtype(DTYPE).itemsize)
    steps = batch * queries * TOKENS / CACHE_SLOTS
    diagonal, rows = batch * queries, 8
    return steps, rows * (steps - diagonal), rows * diagonal


RUNS: Mapping[str, Callable[[int], Runs]] = {
    "decode_attention": _scores,
    "token_scores": _scores,
    "gather_selection": _gather,
    "select_threshold": _threshold,
    "select_sort": _sort,
    "prefill_attention": _prefill,
}
