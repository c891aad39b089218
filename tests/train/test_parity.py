"""Twenty steps of training give the losses of transformers trained by torch's AdamW, in float32."""

from dataclasses import asdict

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from recycled_jax.hf import load_hf
from tests.recycled_jax.parity import families
from tests.train.parity import runs
from train.config import Optimizer
from train.data import Batch
from train.optimizer import make_optimizer
from train.step import make_train_step, start_state

TOLERANCE = 1e-4  # relative
ONE = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:1])
FAMILIES = sorted(runs.RUNS)
WRONG = ["vectors decay", *runs.wrong(runs.RUNS["llama_3"])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """The `losses` and `gradient_norms` of the trainer's own step, for each family."""
    return {family: train(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def train(folder, family: str) -> dict[str, np.ndarray]:
    model, params = load_hf(families.write_checkpoint(folder, family))
    settings = Optimizer(name="adamw", **asdict(runs.RUNS[family]))
    optimizer = make_optimizer(settings, model.config, runs.STEPS)
    state, step = start_state(model, optimizer, ONE, params), make_train_step(model, optimizer, ONE)
    losses, norms = [], []
    for tokens in runs.batches():
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        state, metrics = step(
            state, Batch(tokens, positions, np.ones(tokens.shape, np.float32), np.zeros(tokens.shape, bool))
        )
        losses.append(float(metrics.loss))
        norms.append(float(metrics.gradient_norm))
    return {"losses": np.asarray(losses), "gradient_norms": np.asarray(norms)}


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_torch(family, trained):
    expected = runs.golden(family)["right"]
    assert len(expected["losses"]) == runs.STEPS
    for name, values in trained[family].items():
        np.testing.assert_allclose(values, expected[name], rtol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_runs_learn_and_some_steps_are_clipped(family, trained):
    losses, norms = trained[family].values()
    assert losses[-3:].mean() < 0.7 * losses[:3].mean()
    assert 5 <= np.sum(norms > runs.RUNS[family].clip) <= runs.STEPS - 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrong", WRONG)
def test_one_wrong_setting_would_show(wrong, family, trained):
    # torch with the wrong setting, which needs no compilation here, against ours with the right one
    difference = trained[family]["losses"] / runs.golden(family)[wrong]["losses"] - 1
    assert np.abs(difference).max() > 10 * TOLERANCE
