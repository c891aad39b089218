"""Bytes that a decode step must read and write, from shapes and the observed schedule, and how fast they could be.

With b bytes per element, N layers, H kv heads, heads of D channels, n slots in use and K in a selection, a dense step
reads the weights and 2nHDb of each layer, a recycled step 2KHDb. A refresh reads nHDb to score, or 2nHDb if it attends
the whole cache in the same pass, and 2KHDb more to copy the selection, which it also writes. All but the weights are
multiplied by the rows of the batch, and what is divided over `shards` devices counts for one of them.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from recycled_jax.config import LlamaConfig
from recycled_jax.frame import LayerTrace, Recycling
from recycled_jax.policies import Policy

Slots = Float[np.ndarray, "steps layers batch"]


@dataclass(frozen=True)
class StepBytes:
    """Bytes per decode step of a whole batch, means over the steps. `scores`: what scorers read (keys, or what they
    keep in their place) beside what is attended. `kv_write`: selections copied into compact buffers; the new token's
    key and value, one slot, are left out, as everywhere."""

    weights: float
    kv_read: float
    kv_write: float = 0.0
    scores: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.kv_read + self.kv_write + self.scores

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def weights_read(config: LlamaConfig, params: Mapping, *, batch: int, shards: int = 1) -> float:
    """Weight bytes that a step reads: all, but of an embedding that is not the head as well only the tokens' rows."""
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if config.tie_embeddings:
        return everything / shards
    table = params["params"]["embed_tokens"]
    return (everything - table.nbytes + batch * config.embed * table.dtype.itemsize) / shards


def dense_bytes(
    config: LlamaConfig,
    prompts: Int[np.ndarray, " batch"],
    *,
    steps: int,
    weights: float,
    element: int,
    shards: int = 1,
) -> StepBytes:
    """Of a policy that reads everything, over `steps` steps after prompts of these lengths; `element`: bytes of one."""
    slots = 2 * _in_use(prompts, steps) * np.ones((1, config.layers, 1))
    return StepBytes(weights, _mean(slots, config, element, shards))


def observed_bytes(
    config: LlamaConfig,
    policy: Policy,
    trace: LayerTrace,
    prompts: Int[np.ndarray, " batch"],
    *,
    weights: float,
    element: int,
    shards: int = 1,
) -> StepBytes:
    """By the trace of a block of steps after prompts of these lengths: every layer weighs by its refreshes.

    `trace.attended` and `trace.scored` are in slots per kv head; a key and its value are two of the latter.
    """
    attended, scored = np.asarray(trace.attended, float), np.asarray(trace.scored, float)
    copied = np.zeros_like(scored)
    if isinstance(policy.method, Recycling):
        held = np.minimum(policy.method.selector.k, _in_use(prompts, len(scored)))
        # a dense layer of the plan says that it refreshes, but has copied nothing
        copied = np.where(np.asarray(trace.refreshed), np.minimum(2 * held, scored), 0)
    read, written, scores = (
        _mean(slots, config, element, shards) for slots in (2 * attended + copied, copied, scored - copied)
    )
    return StepBytes(weights, read, written, scores)


def bandwidth() -> tuple[float, str]:
    """Bytes per second between memory and the default device, and where the figure comes from.

    Of a TPU, JAX's `tpu_info`; elsewhere the rate at which a large array is read now, `measured`.
    """
    if jax.default_backend() == "tpu":
        return tpu_bandwidth(), "tpu_info"
    return read_rate(), "measured"


def tpu_bandwidth() -> float:
    """Of the device of the default backend, or of the abstract mesh in use: all cores of it."""
    info = pltpu.get_tpu_info()
    return float(info.mem_bw_bytes_per_second * info.num_cores)


def read_rate(megabytes: int = 256, runs: int = 10) -> float:
    """Bytes per second at which an array is summed, best of the runs."""
    source = jnp.ones(megabytes << 18, jnp.float32)
    total = jax.jit(jnp.sum).lower(source).compile()
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(total(source))
        seconds.append(time.perf_counter() - started)
    return source.nbytes / min(seconds)


def _in_use(prompts: Int[np.ndarray, " batch"], steps: int) -> Slots:
    """Slots in use at each step, the present token included; the axis of layers is 1."""
    return (np.asarray(prompts)[None, :] + 1 + np.arange(steps)[:, None])[:, None, :]


def _mean(slots: Slots, config: LlamaConfig, element: int, shards: int) -> float:
    """Mean over steps of the sum over layers and rows, in bytes."""
    per_step = slots.sum(axis=(1, 2)).mean()
    return float(per_step * config.kv_heads * config.head_dim * element / shards)
