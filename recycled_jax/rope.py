"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), with Llama 3.1's frequency stretch."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from recycled_jax.config import LlamaConfig


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per token of each channel pair, float32 `[head_dim / 2]`.

    With `rope_scaling`, wavelengths longer than the original length / `low_freq_factor` are stretched by `factor`,
    those shorter than original length / `high_freq_factor` are kept, the ones between are blended (Llama 3.1).
    """
    # Rounded to float32 where transformers rounds: parity at long positions needs the same frequencies. The power
    # itself is in float64, because float32 powers differ by a unit in the last place between libraries.
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    power = np.power(np.float64(config.rope_theta), exponent.astype(np.float64))
    inverse = np.float32(1) / power.astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    wavelength = 2 * np.pi / inverse
    stretched = inverse / scaling.factor
    smooth = (scaling.original_length / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * stretched + smooth * inverse
    long = wavelength > scaling.original_length / scaling.low_freq_factor
    short = wavelength < scaling.original_length / scaling.high_freq_factor
    return np.where(long, stretched, np.where(short, inverse, blended)).astype(np.float32)


def angles(
    config: LlamaConfig, positions: Int[Array, "#batch tokens"]
) -> tuple[Float[Array, "#batch tokens half"], Float[Array, "#batch tokens half"]]:
    """Cosine and sine of every position's rotation, float32; made once per forward pass, shared by all layers."""
    turned = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(config))[None, None, :]
    return jnp.cos(turned), jnp.sin(turned)


def rotate(
    x: Float[Array, "batch heads tokens head_dim"],
    cosine: Float[Array, "#batch tokens half"],
    sine: Float[Array, "#batch tokens half"],
) -> Float[Array, "batch heads tokens head_dim"]:
    """`x` turned to its positions; channel i pairs with i + head_dim / 2 (the layout of published checkpoints)."""
    cosine, sine = cosine[:, None], sine[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
