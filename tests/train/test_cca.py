"""Training with CCA-Attention in place of causal attention."""

import dataclasses

import jax
import numpy as np
import pytest

import train.loop
from recycled_jax.cca import CCA
from recycled_jax.model import Llama
from tests.train import tiny_run
from tests.train.test_step import ADAMW, CONFIG, ONE, STEPS, batch
from train.__main__ import parse
from train.config import Mesh
from train.step import init_state, make_mesh, make_optimizer, make_train_step


def losses(mesh, rule: CCA) -> list[float]:
    """On a batch that is seen again and again."""
    model = Llama(CONFIG, attention=rule)
    optimizer = make_optimizer(ADAMW, CONFIG, STEPS)
    state, step = init_state(model, optimizer, mesh, seed=0), make_train_step(model, optimizer, mesh)
    history = []
    for _ in range(STEPS):
        state, metrics = step(state, batch())
        history.append(float(jax.device_get(metrics.loss)))
    return history


def test_it_learns_and_eight_devices_compute_what_one_does():
    found = losses(ONE, CCA(group=4, window=6))
    assert found[-1] < 0.5 * found[0]
    np.testing.assert_allclose(losses(make_mesh(Mesh(data=2, fsdp=2, tensor=2)), CCA(4, 6)), found, rtol=1e-4)
    full = losses(ONE, CCA(group=4, window=24))  # of 24 tokens
    assert abs(full[-1] - found[-1]) > 1e-3 * found[-1]


def test_a_run_trains_what_its_config_says(tmp_path, monkeypatch):
    config = tiny_run.config(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {cca: {group: 4, window: 12}}\n")
    cca = parse(["--config", str(tmp_path / "run.yaml")]).model.cca
    assert cca == CCA(group=4, window=12)
    trained = []

    def stop(model, *rest):
        trained.append(model.attention)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.loop, "make_train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train.loop.train(dataclasses.replace(config, model=dataclasses.replace(config.model, cca=cca)))
    assert trained == [cca]
