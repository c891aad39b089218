"""The least a device must move between its memory and itself in a decode step: bytes, and time by its bandwidth.

With b bytes per element, N layers, H kv heads, heads of D channels, n slots in use and K in a selection, a full step
reads the weights and 2nHDb of each layer, a recycled step 2KHDb. A refresh reads nHDb to score, or 2nHDb if it attends
the whole cache in the same pass, and 2KHDb more to copy the selection, which it also writes. All but the weights are
multiplied by the rows of the batch, and all is divided over the devices of the mesh.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from recycled_jax.frame.layer_plan import Role
from recycled_jax.frame.recycling import Recycling
from recycled_jax.frame.schedules import FixedStride, Never, QueryCheck
from recycled_jax.planning.chips import Chip
from recycled_jax.planning.setting import Setting
from recycled_jax.planning.sizes import DTYPE, weight_bytes
from recycled_jax.state import model_cache


@dataclass(frozen=True)
class Floors:
    """Bytes per device and step. `full`: a policy that reads everything; `refresh` and `recycled`: the steps of this
    one, a refresh every `stride` steps (infinity: never)."""

    full: float
    refresh: float
    recycled: float
    stride: float

    @property
    def mean(self) -> float:
        """Bytes per step over a stride."""
        return self.recycled + (self.refresh - self.recycled) / self.stride

    @property
    def speedup(self) -> float:
        """How many times faster than full steps this policy's can be on average, if bytes are all that counts."""
        return self.full / self.mean

    @property
    def limit(self) -> float:
        """What `speedup` comes to with ever longer strides: that of a recycled step."""
        return self.full / self.recycled

    def milliseconds(self, chip: Chip) -> dict[str, float]:
        """Of each kind of step."""
        kinds = {"full": self.full, "refresh": self.refresh, "recycled": self.recycled, "mean": self.mean}
        return {kind: chip.microseconds(bytes=round(moved)) / 1000 for kind, moved in kinds.items()}


def floors(setting: Setting) -> Floors:
    """With `context` slots in use in every row.

    Raises ValueError for a policy that does not recycle, or by a schedule without a stride.
    """
    method, stride = recycling(setting), stride_of(setting)
    element, slots = jnp.dtype(DTYPE).itemsize, setting.context
    heads = setting.config.kv_heads // setting.mesh.tensor
    channel_bytes = setting.config.head_dim * element
    stored = channel_bytes if setting.cache_dtype is None else setting.config.head_dim + 4  # a float32 scale
    layer_slot = setting.rows * heads
    everything = 2 * layer_slot * slots * stored / setting.mesh.sequence
    held = min(method.selector.k, slots)
    selection = 2 * layer_slot * held * channel_bytes
    scored = everything if method.refresh == "full" else _scored(setting, method) * layer_slot * stored
    # of each role: a full step's, a refresh's, a recycled step's bytes
    by_role: dict[Role, tuple[float, float, float]] = {
        "dense": (everything, everything, everything),
        "select": (everything, scored + 2 * selection, selection),
        "follow": (everything, 2 * selection, selection),
    }
    layers = [by_role[role] for role in _roles(setting, method)]
    weights = weights_read(setting)
    full, refresh, recycled = (weights + sum(kind) for kind in zip(*layers, strict=True))
    return Floors(full, refresh, recycled, stride)


def weights_read(setting: Setting) -> float:
    """Weight bytes that a device reads: all it has, but of an embedding that is not the head as well only the tokens'
    rows."""
    config, mesh = setting.config, setting.mesh
    everything = weight_bytes(config, mesh)
    if config.tie_embeddings:
        return float(everything)
    row = config.embed * jnp.dtype(DTYPE).itemsize / (mesh.fsdp * mesh.tensor)
    return everything - config.vocab * row + setting.batch * row


def recycling(setting: Setting) -> Recycling:
    """The policy's method. Raises ValueError for one that is not of full and recycled steps."""
    method = setting.policy.method
    if not isinstance(method, Recycling):
        raise ValueError(
            f"policy={setting.policy_name!r} has no recycled steps to plan, expected one that refreshes by a schedule, "
            "such as 'recycled'"
        )
    return method


def stride_of(setting: Setting) -> float:
    """Steps per refresh: the fewest there can be where the schedule looks at queries."""
    schedule = recycling(setting).schedule
    if isinstance(schedule, Never):
        return math.inf
    if isinstance(schedule, FixedStride | QueryCheck):
        return float(schedule.stride)
    raise ValueError(f"policy={setting.policy_name!r} refreshes without a stride, expected one with a stride to plan")


def _roles(setting: Setting, method: Recycling) -> Iterator[Role]:
    for role, run in method.runs(setting.config.layers):
        for _ in run:
            yield role


def _scored(setting: Setting, method: Recycling) -> float:
    """Slots of keys on a device that scoring reads for one row and kv head."""
    sizes = {"batch": 1, "capacity": setting.capacity, "dtype": DTYPE, "implementation": None}
    cache = jax.eval_shape(lambda: model_cache(setting.config, **sizes))
    lengths = jnp.array([setting.context], jnp.int32)
    return float(np.asarray(method.scorer.reads(lengths, cache))[0]) / setting.mesh.sequence
