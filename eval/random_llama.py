"""A Llama with random weights, for benchmarks: the time of a step does not depend on what a model has learnt."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from recycled_jax.config import LlamaConfig
from recycled_jax.hf import save_hf
from recycled_jax.model import Llama
from recycled_jax.weights import Weight, map_weights


@dataclass(frozen=True)
class RandomLlama:
    """Sizes of the model, and the seed of its weights.

    Args:
        seed: Of the weights; the same seed gives the same weights.
        layers: Number of layers.
        embed: Width of the residual stream.
        query_heads: Query heads of a layer.
        kv_heads: Kv heads of a layer, a divisor of the query heads.
        head_dim: Channels of a head.
        mlp: Width of the gated MLP.
        vocab: Number of tokens.
        rope_theta: Base of the rotary frequencies.
    """

    seed: int = 0
    layers: int = 12
    embed: int = 768
    query_heads: int = 12
    kv_heads: int = 3
    head_dim: int = 64
    mlp: int = 2048
    vocab: int = 32_000
    rope_theta: float = 500_000.0

    @property
    def config(self) -> LlamaConfig:
        """Raises ValueError, naming the size, as `LlamaConfig` does."""
        sizes = {name: value for name, value in asdict(self).items() if name != "seed"}
        return LlamaConfig(**sizes, max_length=131_072)

    @property
    def name(self) -> str:
        """Tells the sizes and the seed apart."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"random_llama-{digest[:12]}"


def make(sizes: RandomLlama, dtype: Any = jnp.float32) -> tuple[Llama, dict]:
    """Model and parameters, drawn as the model's declaration says, in float32, and rounded to `dtype`."""
    config = sizes.config
    keys = map(jax.random.fold_in, itertools.repeat(jax.random.key(sizes.seed)), itertools.count())

    def draw(weight: Weight, *stack: int) -> jax.Array:
        return jnp.asarray(weight.init(next(keys), (*stack, *weight.shape), jnp.float32), dtype)

    params = map_weights(config, draw, lambda weight: draw(weight, config.layers))
    return Llama(config, dtype=dtype, param_dtype=dtype), params


def write(folder: Path, sizes: RandomLlama) -> Path:
    """Writes the float32 checkpoint to `folder / sizes.name`, unless it is there; returns its path."""
    path = folder / sizes.name
    if not path.is_dir():  # it is there only when it is whole
        save_hf(path, *make(sizes))
    return path
