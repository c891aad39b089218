"""The train step: the same on any mesh, donating, learning; and its learning rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from recycled_jax.config import LlamaConfig
from recycled_jax.mesh import MeshSizes, make_mesh
from recycled_jax.model import Llama, causal
from recycled_jax.recycled_attention import RecycledAttention
from train.config import Optimizer
from train.data import Batch
from train.optimizer import learning_rate, make_optimizer
from train.step import init_state, make_train_step

CONFIG = LlamaConfig(
    model_type="qwen2", vocab=64, embed=32, mlp=48, layers=2, query_heads=4, kv_heads=2, head_dim=16, rope_theta=1e6
)
STEPS = 20
ADAMW, MUON = (Optimizer(name=name, learning_rate=1e-2, warmup=2) for name in ("adamw", "muon"))
ONE = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:1])


def batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (8, 24)
    answers = rng.random(shape) < 0.3
    positions = np.cumsum(rng.integers(1, 4, shape), axis=1)
    tokens = rng.integers(0, CONFIG.vocab, shape)
    weights = np.where(answers, 1.0, 0.1) * (rng.random(shape) < 0.9)
    return Batch(tokens.astype(np.int32), positions.astype(np.int32), weights.astype(np.float32), answers)


def run(optimizer: Optimizer, mesh, batches, init: str = "plain", attention=causal, config=CONFIG, **knobs):
    model = Llama(config, attention=attention)
    transformation = make_optimizer(optimizer, config, STEPS)
    state = init_state(model, transformation, mesh, seed=0, init=init)
    step = make_train_step(model, transformation, mesh, **knobs)
    history = []
    for one in batches:
        state, metrics = step(state, one)
        history.append(jax.device_get(metrics))
    return state, np.asarray(history)


@pytest.mark.parametrize(
    ("attention", "sizes"),
    [
        (causal, MeshSizes(data=2, fsdp=2, sequence=2)),
        (RecycledAttention(k=6, stride=4, chunks=3), MeshSizes(fsdp=2, tensor=2, sequence=2)),
    ],
    ids=["causal", "recycled"],
)
def test_tokens_over_devices(attention, sizes):
    config = dataclasses.replace(CONFIG, kv_heads=4)
    batches = [batch(seed) for seed in range(4)]
    _, expected = run(ADAMW, ONE, batches, attention=attention, config=config)
    _, found = run(ADAMW, make_mesh(sizes), batches, attention=attention, config=config)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"kv_heads=2 must be a multiple of tensor x sequence = 4"):
        run(ADAMW, make_mesh(MeshSizes(data=2, tensor=2, sequence=2)), [batch()])


@pytest.mark.parametrize(("optimizer", "init"), [(ADAMW, "plain"), (MUON, "retrieval")], ids=["adamw", "muon"])
def test_eight_devices_compute_what_one_does(optimizer, init):
    batches = [batch(seed) for seed in range(4)]
    alone, expected = run(optimizer, ONE, batches, init)
    shared, found = run(optimizer, make_mesh(MeshSizes(data=2, fsdp=2, tensor=2)), batches, init)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert int(shared.step) == int(alone.step) == len(batches)
    layers = shared.params["params"]["layers"]
    assert layers["q_proj"].sharding.shard_shape(layers["q_proj"].shape) == (2, 16, 2, 16)
    assert layers["down_proj"].sharding.shard_shape(layers["down_proj"].shape) == (2, 24, 16)
    moments = [x for x in jax.tree.leaves(shared.optimizer) if x.shape == layers["down_proj"].shape]
    assert moments and all(x.sharding == layers["down_proj"].sharding for x in moments)


@pytest.mark.parametrize(
    "sizes", [MeshSizes(), MeshSizes(data=2, fsdp=2, tensor=2)], ids=["data", "data, fsdp, tensor"]
)
def test_a_batch_in_parts_gives_the_same_step(sizes):
    """Parts differ in their weights, so means of means would be another loss."""
    rows = [batch(seed)._replace(weights=batch(seed).weights * (1 + seed)) for seed in range(4)]
    doubled = [Batch(*(np.concatenate(fields) for fields in zip(*rows[i : i + 2], strict=True))) for i in (0, 2)]
    whole, expected = run(ADAMW, ONE, doubled)
    parts, found = run(ADAMW, make_mesh(sizes), doubled, accumulate=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), parts.params, whole.params)


def test_z_loss_adds_the_squared_normaliser():
    _, (plain,) = run(ADAMW, ONE, [batch()])
    _, (with_z,) = run(ADAMW, ONE, [batch()], z_loss=1e-2)
    # an untrained model's logits are near 0: the normaliser is near log(vocab), for every token
    assert with_z[0] - plain[0] == pytest.approx(1e-2 * np.log(CONFIG.vocab) ** 2, rel=0.05)
    np.testing.assert_allclose(with_z[1:4], plain[1:4])


def test_a_step_that_is_not_finite_changes_nothing():
    good = batch()
    broken = good._replace(weights=np.where(np.arange(24) == 5, np.inf, good.weights).astype(np.float32))
    before, _ = run(ADAMW, ONE, [good])
    after, history = run(ADAMW, ONE, [good, broken, broken, good, broken])
    assert [tuple(map(int, metrics[-2:])) for metrics in history] == [(0, 0), (1, 1), (2, 2), (0, 2), (1, 3)]
    two_good, _ = run(ADAMW, ONE, [good, good])
    assert int(after.step) == 5 and int(two_good.step) == 2
    jax.tree.map(np.testing.assert_array_equal, after.params, two_good.params)
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, two_good.optimizer)
    assert not np.array_equal(before.params["params"]["embed_tokens"], after.params["params"]["embed_tokens"])


def test_loss_falls_on_a_fixed_batch():
    _, history = run(ADAMW, ONE, [batch()] * STEPS)
    loss, text_loss, answer_loss, answer_accuracy, gradient_norm, *_ = history.T
    assert loss[0] == pytest.approx(np.log(CONFIG.vocab), rel=0.02)
    assert loss[-1] < 0.5 * loss[0] and answer_loss[-1] < 0.5 * answer_loss[0] and text_loss[-1] < text_loss[0]
    assert answer_accuracy[-1] > answer_accuracy[0] + 0.3
    assert (gradient_norm > 0).all()


def test_loss_is_the_weighted_mean_of_its_parts():
    one = batch()
    where = one.answers.copy()
    where[:, 0] = False
    weights = np.where(one.answers, 3.0, 0.5).astype(np.float32)
    _, history = run(ADAMW, ONE, [one._replace(weights=weights)])
    loss, text_loss, answer_loss, *_ = history[0]
    answers, text = where[:, 1:].sum(), (~where[:, 1:]).sum()
    expected = (3 * answers * answer_loss + 0.5 * text * text_loss) / (3 * answers + 0.5 * text)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_state_is_donated():
    model, optimizer = Llama(CONFIG), make_optimizer(ADAMW, CONFIG, STEPS)
    state = init_state(model, optimizer, ONE, seed=0)
    after, _ = make_train_step(model, optimizer, ONE)(state, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_mesh_takes_all_devices():
    assert dict(make_mesh(MeshSizes()).shape) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert dict(make_mesh(MeshSizes(data=2, fsdp=-1, tensor=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
        "sequence": 1,
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "mesh=.*'data': 3.* covers 3 devices, there are 8|needs a multiple of 3 devices, there are 8"),
        ({"tensor": 3}, "mesh=.*'tensor': 3.* needs a multiple of 3 devices, there are 8"),
        ({"data": 2}, "mesh=.*'data': 2.* covers 2 devices, there are 8"),
        ({"data": 0}, "mesh=.*'data': 0.* must have sizes of at least 1, or -1 in one place"),
        ({"data": -1, "fsdp": -1}, "mesh=.*'fsdp': -1.* must have sizes of at least 1, or -1 in one place"),
    ],
)
def test_mesh_that_the_devices_cannot_make(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshSizes(**sizes))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
def test_learning_rate_ends_where_it_should(steps, schedule):
    config = Optimizer(learning_rate=0.5, warmup=100, final=0.1, schedule=schedule)
    rates = np.asarray(jax.vmap(learning_rate(config, steps))(np.arange(steps + 1)))
    assert rates[-1] == pytest.approx(0.05)
    assert rates.max() == pytest.approx(0.5)
    peak = rates.argmax()
    assert peak == min(config.warmup, steps // 2)
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_without_warm_up(schedule):
    rate = learning_rate(Optimizer(warmup=0, learning_rate=0.5, schedule=schedule), 10)
    assert float(rate(0)) == pytest.approx(0.5)


def test_linear_learning_rate_by_hand():
    rate = learning_rate(Optimizer(warmup=2, learning_rate=1.0, final=0.0, schedule="linear"), 6)
    np.testing.assert_allclose([rate(step) for step in range(7)], [0, 0.5, 1, 0.75, 0.5, 0.25, 0], atol=1e-6)


def test_vectors_do_not_decay():
    config = dataclasses.replace(ADAMW, weight_decay=0.5, warmup=0)
    optimizer = make_optimizer(config, CONFIG, STEPS)
    params = jax.tree.map(jnp.ones_like, init_state(Llama(CONFIG), optimizer, ONE, seed=0).params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    top, layers = updates["params"], updates["params"]["layers"]
    for update in (layers["input_norm"], layers["q_bias"], top["final_norm"]):
        assert not update.any()
    for update in (layers["q_proj"], layers["down_proj"], top["embed_tokens"]):
        np.testing.assert_allclose(update, -0.5 * config.learning_rate)
