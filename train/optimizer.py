"""The optimiser: what an update does with a gradient, and how large it is at each step."""

from typing import Any

import optax

from recycled_jax.config import LlamaConfig
from recycled_jax.weights import Weight, map_weights
from train.config import Optimizer


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up, then down to `final` of the peak at the last step."""
    warmup, last = min(config.warmup, steps // 2), config.final * config.learning_rate
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, steps, end_value=last)
    up = optax.linear_schedule(0.0, config.learning_rate, warmup)
    down = optax.linear_schedule(config.learning_rate, last, steps - warmup)
    return optax.join_schedules([up, down], [warmup]) if warmup else down


def make_optimizer(config: Optimizer, model: LlamaConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon for the layers' matrices with AdamW, without decay, for the rest. Vectors (norms,
    biases) never decay."""
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
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def _decays(weight: Weight) -> bool:
    return weight.inputs != 0


def _matrix_axes(weight: Weight) -> Any:
    """A stacked layer weight as the matrix it multiplies by; vectors are left to AdamW."""
    if not weight.inputs:
        return None
    axes = tuple(range(1, 1 + len(weight.shape)))  # axis 0 is the layer
    return optax.contrib.MuonDimensionNumbers(reduction_axis=axes[: weight.inputs], output_axis=axes[weight.inputs :])
