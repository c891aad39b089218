"""How a policy does on one batch: what it generates, how fast, and what it reads."""

import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise

from recycled_jax.decode import Params
from recycled_jax.frame import Prefilled
from recycled_jax.generate import generate
from recycled_jax.model import Llama
from recycled_jax.policies import Policy

BLOCK = 8  # decode steps between two looks at the clock
BLOCKS = 8  # the first may compile and is not timed


@dataclass(frozen=True)
class Measurement:
    """`tokens` of every row, `steps + 1` each, whatever they are: no row stops early, so that all policies
    are timed at the same work. `step_seconds`: median over the timed blocks, for the whole batch. Bytes are of keys and
    values, read per token and row."""

    tokens: list[list[int]]
    step_seconds: float
    kv_bytes: float
    dense_kv_bytes: float
    steps: int
    refreshes: float

    @property
    def effective_stride(self) -> float:
        """Decode steps per refresh, over all rows and layers; infinite without any."""
        return self.steps / self.refreshes if self.refreshes else float("inf")


def measure(
    model: Llama,
    params: Params,
    prompts: Prefilled,
    *,
    policy: Policy,
    block: int = BLOCK,
    blocks: int = BLOCKS,
) -> Measurement:
    """Decodes a batch of prompts greedily and takes the time of decoding alone, after compilation.

    The prompts have been read with room for `block * blocks + 1` tokens. `block` steps run between two looks at the
    clock: a multiple of the stride, so that every block refreshes alike.
    """
    endless = model.clone(config=replace(model.config, eos_ids=()))
    clock: list[float] = []
    done = generate(
        endless,
        params,
        prompts,
        policy=policy,
        max_new_tokens=block * blocks + 1,
        block=block,
        on_block=lambda _: clock.append(time.perf_counter()),
    )
    times = [end - start for start, end in pairwise(clock[1:])]  # clock[0] is the end of prefill
    telemetry = done.telemetry
    return Measurement(
        done.tokens,
        statistics.median(times) / block,
        float(telemetry.kv_bytes_per_token().mean()),
        float(telemetry.dense_kv_bytes_per_token().mean()),
        block * blocks,
        float(telemetry.refreshes().mean()),
    )
