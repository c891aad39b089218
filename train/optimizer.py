"""The optimiser: what an update does with a gradient, and how large it is at each step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from recycled_jax.config import LlamaConfig
from recycled_jax.weights import Weight, map_weights
from train.config import Optimizer
from train.step import TrainState


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up, then down to `final` of the peak at the last step."""
    warmup, last = min(config.warmup, steps // 2), config.final * config.learning_rate
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, steps, end_value=last)
    up = optax.linear_schedule(0.0, config.learning_rate, warmup)
    down = optax.linear_schedule(config.learning_rate, last, steps - warmup)
    return optax.join_schedules([up, down], [warmup]) if warmup else down


class Average(NamedTuple):
    """The part of the optimiser's state that `averaged` looks for."""

    params: Any


def average_params(decay: float) -> optax.GradientTransformation:
    """Keeps the exponential average of the parameters, as updated; the last of a chain."""

    def update(updates, state: Average, params):
        def moved(average, param, step):
            return decay * average + (1 - decay) * (param + step)

        return updates, Average(jax.tree.map(moved, state.params, params, updates))

    # a copy: parameters and average are donated side by side
    return optax.GradientTransformation(lambda params: Average(jax.tree.map(jnp.copy, params)), update)  # pyright: ignore[reportArgumentType]


def averaged(state: TrainState) -> Any:
    """The average of the parameters if the optimiser keeps one, else the parameters."""
    return next((part.params for part in state.optimizer if isinstance(part, Average)), state.params)


def make_optimizer(
    config: Optimizer, model: LlamaConfig, steps: int, *, ema: float = 0.0
) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon for the layers' matrices with AdamW, without decay, for the rest. Vectors (norms,
    biases) never decay. With `ema`, the average of the parameters is kept too."""
    rate = learning_rate(config, steps)
    if config.name == "adamw":
        decaying = map_weights(model, _decays, _decays)
        update = optax.adamw(
            rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decaying
        )
    else:
        update = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=map_weights(model, lambda weight: None, _matrix_axes),
        )
    last = [average_params(ema)] if ema else []
    return optax.chain(optax.clip_by_global_norm(config.clip), update, *last)


def _decays(weight: Weight) -> bool:
    return weight.inputs != 0


def _matrix_axes(weight: Weight) -> Any:
    """A stacked layer weight as the matrix it multiplies by; vectors are left to AdamW."""
    if not weight.inputs:
        return None
    axes = tuple(range(1, 1 + len(weight.shape)))  # axis 0 is the layer
    return optax.contrib.MuonDimensionNumbers(reduction_axis=axes[: weight.inputs], output_axis=axes[weight.inputs :])
