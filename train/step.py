"""The train step: state in, state out, compiled for a mesh; and the optimiser."""

from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recycled_jax.config import LlamaConfig
from recycled_jax.model import Llama, causal
from recycled_jax.sharding import param_shardings
from recycled_jax.weights import Weight, map_weights
from train.config import Mesh as MeshSizes
from train.config import Optimizer
from train.data import Batch
from train.init import retrieval_init


@struct.dataclass
class TrainState:
    """Everything a resumed run needs but the data, which follow from `step`."""

    step: jax.Array  # int32 []: optimiser steps taken
    params: Any
    optimizer: Any


class Metrics(NamedTuple):
    """Means over the batch of one step; `loss` is the weighted objective, in nats per token."""

    loss: jax.Array
    text_loss: jax.Array
    answer_loss: jax.Array
    answer_accuracy: jax.Array
    gradient_norm: jax.Array


def make_mesh(sizes: MeshSizes) -> Mesh:
    """A mesh over all devices; one axis may be -1. Raises ValueError when the sizes do not divide the devices."""
    shape = {"data": sizes.data, "fsdp": sizes.fsdp, "tensor": sizes.tensor}
    devices = jax.device_count()
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if devices % fixed:
        raise ValueError(f"mesh={shape} needs a multiple of {fixed} devices, there are {devices}")
    resolved = [devices // fixed if size == -1 else size for size in shape.values()]
    if int(np.prod(resolved)) != devices:
        raise ValueError(f"mesh={shape} covers {int(np.prod(resolved))} devices, there are {devices}")
    return jax.make_mesh(tuple(resolved), tuple(shape), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine to `final` of the peak at the last step."""
    warmup = min(config.warmup, steps // 2)
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, steps, end_value=config.final * config.learning_rate
    )


def make_optimizer(config: Optimizer, model: LlamaConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon for the layers' matrices with AdamW for the rest."""
    rate = learning_rate(config, steps)
    if config.name == "adamw":
        update = optax.adamw(rate, b2=0.98, weight_decay=config.weight_decay)
    else:
        update = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b2=0.98,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=map_weights(model, lambda weight: None, _matrix_axes),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def _matrix_axes(weight: Weight):
    """A stacked layer weight as the matrix it multiplies by; vectors are left to AdamW."""
    if not weight.inputs:
        return None
    axes = tuple(range(1, 1 + len(weight.shape)))  # axis 0 is the layer
    return optax.contrib.MuonDimensionNumbers(reduction_axis=axes[: weight.inputs], output_axis=axes[weight.inputs :])


def loss_and_metrics(
    model: Llama, params: Any, batch: Batch
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Weighted next-token cross-entropy, and (text loss, answer loss, answer accuracy)."""
    logits = cast(jax.Array, model.apply(params, batch.tokens, batch.positions))[:, :-1]
    targets, weights, answers = batch.tokens[:, 1:], batch.weights[:, 1:], batch.answers[:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    text = (weights > 0) & ~answers
    right = jnp.argmax(logits, axis=-1) == targets

    def mean(values, where):
        return jnp.sum(values * where) / jnp.maximum(jnp.sum(where), 1)

    return mean(nll, weights), (mean(nll, text), mean(nll, answers), mean(right, answers))


def make_train_step(model: Llama, optimizer: optax.GradientTransformation, mesh: Mesh):
    """`(state, batch) → (state, metrics)`, jitted with the state donated and rows spread over `data` and `fsdp`."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        value_and_grad = jax.value_and_grad(lambda params: loss_and_metrics(model, params, batch), has_aux=True)
        (loss, aux), gradient = value_and_grad(state.params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimizer_state), Metrics(
            loss, *aux, gradient_norm=optax.tree.norm(gradient)
        )

    shardings = state_shardings(model, optimizer, mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def init_state(
    model: Llama, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, init: str = "plain"
) -> TrainState:
    """A fresh state, every array born in its shard; `init` as in `ModelSizes`."""
    shardings = state_shardings(model, optimizer, mesh)
    return jax.jit(lambda: _fresh(model, optimizer, seed, init), out_shardings=shardings)()


def start_state(model: Llama, optimizer: optax.GradientTransformation, mesh: Mesh, params: Any) -> TrainState:
    """A fresh state for parameters from elsewhere, which are donated."""
    shardings = state_shardings(model, optimizer, mesh)
    return jax.jit(lambda params: _at_first(optimizer, params), out_shardings=shardings, donate_argnums=0)(params)


def abstract_state(model: Llama, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda: _fresh(model, optimizer, 0))
    shardings = state_shardings(model, optimizer, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def state_shardings(model: Llama, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Parameters by the rules table; optimiser moments as the parameter they belong to; counters replicated."""
    params = param_shardings(model.config, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    of_param = {_dict_keys(path): sharding for path, sharding in jax.tree.leaves_with_path(params)}
    shapes = jax.eval_shape(lambda: _fresh(model, optimizer, 0))
    # an optimiser mirrors the parameter tree inside its own: a moment is known by the dict keys of its parameter
    moments = jax.tree.map_with_path(lambda path, _: of_param.get(_dict_keys(path), replicated), shapes.optimizer)
    return replace(shapes, step=replicated, params=params, optimizer=moments)


def _dict_keys(path) -> tuple[str, ...]:
    keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
    return keys[keys.index("params") :] if "params" in keys else keys


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def _fresh(model: Llama, optimizer: optax.GradientTransformation, seed: int, init: str = "plain") -> TrainState:
    # attention has no parameters, and that of the run may ask for more than one token
    params = model.clone(attention=causal).init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
    if init == "retrieval":
        params = retrieval_init(model.config, params, jax.random.key(seed + 1))
    return _at_first(optimizer, params)


def _at_first(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
