"""Bytes that a device holds, from shapes alone: weights, cache, and what the policy keeps beside it."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recycled_jax.config import LlamaConfig
from recycled_jax.decode import begin, read_prompts
from recycled_jax.mesh import MeshSizes
from recycled_jax.model import Llama
from recycled_jax.planning.setting import CHUNK, Setting
from recycled_jax.policies import make_policy
from recycled_jax.sharding import RULES
from recycled_jax.state import CacheDtype
from recycled_jax.weights import Weight, map_weights

DTYPE = jnp.bfloat16  # of weights and computation


@dataclass(frozen=True)
class Sizes:
    """Bytes on one device. `selection` is all that the policy keeps: its compact buffer, positions, memory."""

    weights: int
    cache: int
    selection: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.selection


def sizes(setting: Setting) -> Sizes:
    """What a device holds between two decode steps; no temporaries, and no padding to tiles."""
    local = _local(setting.config, setting.mesh)
    policy = (setting.policy_name, _hashable(setting.knobs))
    # bytes of a row are the same however many there are, so one is enough to trace
    cache, kept = _state_bytes(local, setting.capacity, *policy, setting.cache_dtype)
    weights = weight_bytes(setting.config, setting.mesh)
    return Sizes(weights, setting.rows * cache // setting.mesh.sequence, setting.rows * kept)


def weight_bytes(config: LlamaConfig, mesh: MeshSizes) -> int:
    """Of the weights that lie on one device of the mesh."""

    def of(weight: Weight) -> int:
        divided = math.prod(getattr(mesh, axis) for name in weight.axes for axis in RULES[name])
        return math.prod(weight.shape) * jnp.dtype(DTYPE).itemsize // divided

    return sum(jax.tree.leaves(map_weights(config, of, lambda weight: config.layers * of(weight))))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree of abstract arrays."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def params_of(config: LlamaConfig) -> Any:
    """The parameters as shapes."""
    return map_weights(
        config,
        lambda weight: jax.ShapeDtypeStruct(weight.shape, DTYPE),
        lambda weight: jax.ShapeDtypeStruct((config.layers, *weight.shape), DTYPE),
    )


def _local(config: LlamaConfig, mesh: MeshSizes) -> LlamaConfig:
    """The heads of one device."""
    heads, kv_heads = config.query_heads // mesh.tensor, config.kv_heads // mesh.tensor
    return replace(config, query_heads=heads, kv_heads=kv_heads)


@functools.lru_cache
def _state_bytes(
    config: LlamaConfig, capacity: int, policy: str, knobs: tuple, cache_dtype: CacheDtype | None
) -> tuple[int, int]:
    """Of one row after a prompt: the cache, and what the policy keeps."""
    made = make_policy(policy, **dict(knobs))
    model = Llama(config, dtype=DTYPE, param_dtype=DTYPE)

    def read(params, tokens, lengths):
        prefilled = read_prompts(
            model,
            params,
            tokens,
            lengths,
            capacity=capacity,
            chunk=CHUNK,
            prefill=made.prefill,
            observers=made.observers,
            cache_dtype=cache_dtype,
        )
        state = begin(made, prefilled)
        return jax.tree.leaves(state.cache), jax.tree.leaves(state.kept)

    tokens = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32)
    cache, kept = jax.eval_shape(read, params_of(config), tokens, jax.ShapeDtypeStruct((1,), jnp.int32))
    return nbytes(cache), nbytes(kept)


def _hashable(knobs: dict[str, Any]) -> tuple:
    return tuple((name, tuple(knob) if isinstance(knob, list) else knob) for name, knob in sorted(knobs.items()))
