"""The train step: state in, state out, compiled for a mesh."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from recycled_jax.model import Llama, causal, logits
from recycled_jax.sharding import constrain, named_sharding, param_shardings
from train.data import Batch
from train.init import retrieval_init


@struct.dataclass
class TrainState:
    """Everything a resumed run needs but its place in the data."""

    step: jax.Array  # int32 []: batches seen
    skipped: jax.Array  # int32 []: how many of the last ones, without a gap, changed nothing
    skipped_in_all: jax.Array  # int32 []
    params: Any
    optimizer: Any


class Metrics(NamedTuple):
    """Means over the batch of one step; `loss` is the weighted objective, in nats per token. `skipped` counts the last
    steps in a row that changed nothing, this one included, `skipped_in_all` those since the run began."""

    loss: jax.Array
    text_loss: jax.Array
    answer_loss: jax.Array
    answer_accuracy: jax.Array
    gradient_norm: jax.Array
    skipped: jax.Array
    skipped_in_all: jax.Array


class Sums(NamedTuple):
    """What the means are made of, over the predicted tokens of some rows; they add up over parts of a batch."""

    loss: jax.Array
    weight: jax.Array
    text_loss: jax.Array
    text: jax.Array
    answer_loss: jax.Array
    right: jax.Array
    answers: jax.Array


def loss_sums(model: Llama, params: Any, batch: Batch, z_loss: float = 0.0) -> Sums:
    """Next-token cross-entropies, weighted for `loss` (with `z_loss` times the squared log-normaliser)."""

    def of_last_layer(weights, config, x) -> Sums:
        # All tokens, so that they divide among devices as before; the last one predicts nothing.
        values = constrain(logits(weights, config, x), ("batch", "tokens", "vocab"), model.mesh)
        targets, weight, answers = (_next(field) for field in (batch.tokens, batch.weights, batch.answers))
        normaliser = jax.nn.logsumexp(values, axis=-1)
        # A sum over the vocabulary, and below its maximum: nothing else of the logits need cross devices.
        is_target = lax.broadcasted_iota(jnp.int32, values.shape, 2) == targets[..., None]
        of_target = jnp.sum(jnp.where(is_target, values, 0), axis=-1)
        nll, right = normaliser - of_target, of_target >= jnp.max(values, axis=-1)
        predicted = jnp.arange(targets.shape[1])[None, :] < targets.shape[1] - 1
        text = (weight > 0) & ~answers & predicted
        loss = jnp.sum((nll + z_loss * normaliser**2) * weight)
        return Sums(loss, *(jnp.sum(x) for x in (weight, nll * text, text, nll * answers, right & answers, answers)))

    return model.apply(params, batch.tokens, batch.positions, head=of_last_layer)  # pyright: ignore[reportReturnType]


def _next(x: ArrayLike) -> jax.Array:
    """What stands one token further on; zero behind the last."""
    return jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1)))


def make_train_step(
    model: Llama, optimizer: optax.GradientTransformation, mesh: Mesh, *, accumulate: int = 1, z_loss: float = 0.0
):
    """`(state, batch) → (state, metrics)`, jitted with the state donated and rows spread over `data` and `fsdp`.

    The gradient is summed over `accumulate` parts of the batch. Where it or the loss is not finite, the step changes
    nothing but the counts.
    """
    model, shardings = model.clone(mesh=mesh), state_shardings(model, optimizer, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(params: Any, part: Batch):
            sums = loss_sums(model, params, part, z_loss)
            return sums.loss, sums

        gradient_of = jax.grad(loss_of, has_aux=True)

        def add(so_far, part: Batch):
            return jax.tree.map(jnp.add, so_far, gradient_of(state.params, part)), None

        if accumulate == 1:
            gradient, sums = gradient_of(state.params, batch)
        else:
            # Every part has rows of every device: neighbouring rows, which lie on one device, go to different parts.
            parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch)
            shapes = jax.eval_shape(gradient_of, state.params, jax.tree.map(lambda x: x[0], parts))
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            nothing = lax.with_sharding_constraint(nothing[0], shardings.params), nothing[1]
            (gradient, sums), _ = lax.scan(add, nothing, parts)
        weight = jnp.maximum(sums.weight, 1)
        gradient = jax.tree.map(lambda x: x / weight, gradient)
        norm = optax.tree.norm(gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        changed = optax.apply_updates(state.params, updates), optimizer_state
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
        params, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), changed, (state.params, state.optimizer)
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        in_all = state.skipped_in_all + jnp.where(finite, 0, 1)
        metrics = Metrics(
            sums.loss / weight,
            sums.text_loss / jnp.maximum(sums.text, 1),
            sums.answer_loss / jnp.maximum(sums.answers, 1),
            sums.right / jnp.maximum(sums.answers, 1),
            gradient_norm=norm,
            skipped=skipped,
            skipped_in_all=in_all,
        )
        return TrainState(state.step + 1, skipped, in_all, params, optimizer_state), metrics

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
    counts = {name: replicated for name in ("step", "skipped", "skipped_in_all")}
    return replace(shapes, **counts, params=params, optimizer=moments)


def _dict_keys(path) -> tuple[str, ...]:
    keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
    return keys[keys.index("params") :] if "params" in keys else keys


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return named_sharding(("batch", "tokens"), mesh)


def spread(arrays: Any, mesh: Mesh) -> Any:
    """Arrays of [batch, tokens], of which every host has at least the rows of its own devices, laid on the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), arrays)


def _fresh(model: Llama, optimizer: optax.GradientTransformation, seed: int, init: str = "plain") -> TrainState:
    # attention has no parameters, and that of the run may ask for more than one token
    params = model.clone(attention=causal, mesh=None).init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
    if init == "retrieval":
        params = retrieval_init(model.config, params, jax.random.key(seed + 1))
    return _at_first(optimizer, params)


def _at_first(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    nothing = jnp.zeros((), jnp.int32)
    return TrainState(nothing, nothing, nothing, params, optimizer.init(params))
