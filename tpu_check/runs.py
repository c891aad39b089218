"""What the dump does not tell: how often the loops of a kernel run whose trip counts it computes itself, or that are
skipped most of the time.

By the kernel's name, for a program of the shapes in `programs`, whose slots are all in use, and a chip; in the order of
the loops in the code, None for what the code tells (`bundles.cost`). A kernel that computes a trip count and is missing
here, or has another number of loops, is reported as unknown.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.cache import LANES, empty_cache
from pallas_kernels.ops.prefill_attention.pallas_tpu import CACHE_SLOTS, query_block
from pallas_kernels.ops.running_softmax import TILES_TOGETHER
from pallas_kernels.ops.select_tokens.tpu_threshold import CHUNK, GROUP, WORD
from pallas_kernels.ops.verify_attention.pallas_tpu import block_tokens, kept_blocks
from pallas_kernels.ops.verify_attention.tpu_queries import arrange
from recycled_jax.planning.chips import Chip
from tpu_check.programs import BUDGET, DTYPE, MODELS, PREFILL, STEPS, TOKENS, Program

type Runs = Sequence[float | None]


def _scores(program: Program, chip: Chip) -> Runs:
    """After a row's last block, some tiles at a time: scores from logits, and none to fill up with zeros."""
    return program.batch * TOKENS / (LANES * TILES_TOGETHER), 0


def _threshold(program: Program, chip: Chip) -> Runs:
    """For the 8 kv heads of a row: bit planes at every grid step; the search only at a row's last one. It passes over
    the words of all slots first to begin, then for each digit of two bits but the last, for the last, and to end."""
    passes = TOKENS // GROUP // CHUNK
    planes = WORD + (TOKENS - 1).bit_length() + 1  # of the key and of the slot, an even number
    batch = program.batch
    digits = batch * (planes // 2 - 1)
    return None, batch * passes, digits, digits * passes, batch * passes, batch * passes


def _sort(program: Program, chip: Chip) -> Runs:
    """For the 8 kv heads of a row: each register of slots looks for its keys in 2 groups of slots (they stand in order,
    and are taken to be spread evenly); then a bitonic network, where distance 2^d is compared in bits - d steps, among
    registers or, from 2^5 on, among lanes, in 2 pieces."""
    batch, registers, bits = program.batch, BUDGET // LANES, (BUDGET - 1).bit_length()
    steps = [batch * (bits - distance) for distance in range(bits)]
    within = registers.bit_length() - 1
    fetch = (batch * registers, batch * registers * 2)
    network = (batch * bits, sum(steps), *(2 * step for step in steps[:within]), 2 * sum(steps[within:]))
    return *fetch, *network


def _gather(program: Program, chip: Chip) -> Runs:
    """Chunks of entries; in a chunk, and again after the last one, the entries that are empty: none in a full list."""
    return None, 0, 0


def _prefill(program: Program, chip: Chip) -> Runs:
    """The grid itself, which ends where the chunk does, and in it the 8 rows of a block of the cache: one that all
    queries see, or one that only some do, the last of each block of queries."""
    queries = PREFILL / query_block(MODELS["8B"].query_heads, PREFILL, jnp.dtype(DTYPE).itemsize)
    diagonal, rows = program.batch * queries, 8
    steps = diagonal * TOKENS / CACHE_SLOTS
    return steps, rows * (steps - diagonal), rows * diagonal


def _verify(program: Program, chip: Chip) -> Runs:
    """A tile in which not all steps attend all slots; then, after a row's last block, the blocks with kept logits and
    pairs of those without, of which the very last has such a tile again."""
    config = MODELS[program.model]
    sizes = {"layers": 1, "batch": program.batch, "kv_heads": config.kv_heads, "capacity": TOKENS}
    cache = jax.eval_shape(lambda: empty_cache("token_major", **sizes, head_dim=config.head_dim, dtype=DTYPE))
    queries = arrange(cache, config.query_heads, STEPS)
    tokens = block_tokens(cache, queries)
    kept = kept_blocks(cache, queries, config.kv_heads, jnp.dtype(DTYPE), tokens, chip.vmem)
    batch, pairs = program.batch, (TOKENS // tokens - kept + 2) // 2
    return (batch, batch * kept, *((batch * pairs, 0, batch) if kept < TOKENS // tokens else ()))


RUNS: Mapping[str, Callable[[Program, Chip], Runs]] = {
    "decode_attention": _scores,
    "token_scores": _scores,
    "gather_selection": _gather,
    "select_threshold": _threshold,
    "select_sort": _sort,
    "prefill_attention": _prefill,
    "verify_attention": _verify,
}
