"""What a loop of decode steps on the device starts from, and what it hands the host when it comes back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from recycled_jax.frame import LayerTrace
from recycled_jax.model import Llama
from recycled_jax.state import DecodeState


@struct.dataclass
class LoopState:
    """Between two decode steps: `token` is the next to go in, rows that are not `active` have stopped."""

    decode: DecodeState
    token: Int[Array, " batch"]
    active: Bool[Array, " batch"]
    key: jax.Array


class Block(NamedTuple):
    """What a block of steps gave; row b's entries count from `lengths` before the block to `lengths` after it."""

    tokens: Int[Array, "steps batch"]
    log_probs: Float[Array, "steps batch"]
    trace: LayerTrace  # [steps, layers, batch]
    steps: Int[Array, " batch"]  # steps in which the row was active


def empty_block(model: Llama, steps: int, batch: int) -> Block:
    """Room for so many steps."""
    return Block(
        jnp.zeros((steps, batch), jnp.int32),
        jnp.zeros((steps, batch)),
        empty_trace(model, steps, batch),
        jnp.zeros(batch, jnp.int32),
    )


def empty_trace(model: Llama, steps: int, batch: int) -> LayerTrace:
    """Of so many steps, in which nothing was read."""
    layers = (steps, model.config.layers, batch)
    no, nothing = jnp.zeros(layers, bool), jnp.full(layers, jnp.nan)
    return LayerTrace(no, no, nothing, nothing, jnp.zeros(layers), jnp.zeros(layers), nothing)


def is_eos(model: Llama, token: Int[Array, " batch"]) -> Bool[Array, " batch"]:
    """Whether each token is one of the model's end-of-sequence ids."""
    return jnp.isin(token, jnp.array(model.config.eos_ids, jnp.int32))
