"""One tiny random model, shared by the decoding tests; weights large enough that attention is far from uniform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from recycled_jax.config import LlamaConfig
from recycled_jax.model import Llama
from recycled_jax.weights import map_weights

CONFIG = LlamaConfig(
    vocab=48, embed=24, mlp=32, layers=3, query_heads=4, kv_heads=2, head_dim=8, rope_theta=1000.0, max_length=256
)


@functools.cache
def tiny_model(config: LlamaConfig = CONFIG, dtype=jnp.float32):
    """`(model, params)`, the weights drawn with numpy: `jax.random` would compile once per shape."""
    rng = np.random.default_rng(0)

    def draw(shape):
        if len(shape) == 1:
            return 1 + 0.1 * rng.normal(size=shape)
        # 1.6 / sqrt(fan-in): attention probabilities then differ by orders of magnitude
        return 1.6 * rng.normal(size=shape) / np.sqrt(config.embed)

    tree = map_weights(
        config,
        lambda weight: draw(weight.shape),
        lambda weight: np.stack([draw(weight.shape) for _ in range(config.layers)]),
    )
    return Llama(config, dtype=dtype, param_dtype=dtype), jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab, size=length).tolist() for length in lengths]
