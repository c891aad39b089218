"""Whole runs of nine steps: interrupted and resumed, refused, exported."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import train.loop
from recycled_jax.hf import load_hf
from recycled_jax.tokenizer import load_tokenizer
from train.config import TrainConfig
from train.loop import train as train_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch, tokenizer):
    monkeypatch.setattr(train.loop, "train_tokenizer", lambda sentences, merges: tokenizer)


@pytest.fixture
def stop_at(monkeypatch):
    """Makes the train step send SIGTERM to this process when it is called for the n-th time."""

    def arrange(calls: int) -> None:
        make = train.loop.make_train_step

        def make_stopping(*arguments):
            step_fn, called = make(*arguments), []

            def step(state, batch):
                called.append(None)
                if len(called) == calls:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step_fn(state, batch)

            return step

        monkeypatch.setattr(train.loop, "make_train_step", make_stopping)

    with monkeypatch.context():
        yield arrange


def metrics(config: TrainConfig) -> list[dict]:
    """The logged lines, without how fast they were computed."""
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tokenizer):
    """Config and metrics of a run that nothing disturbed."""
    config = tiny(tmp_path_factory.mktemp("uninterrupted"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "train_tokenizer", lambda sentences, merges: tokenizer)
        exported = train_run(config)
    assert exported == Path(config.out) / "hf"
    return config, metrics(config)


def tiny(folder: Path, **changes) -> TrainConfig:
    """Two stages, nine steps, a checkpoint after every third."""


def test_metrics_of_a_run(uninterrupted):
    _, lines = uninterrupted
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 9]
    losses = [line for line in lines if "loss" in line]
    assert [line["length"] for line in losses] == [96] * 4 + [160] * 5
    assert all(np.isfinite(list(line.values())).all() for line in losses)
    scores = [line for line in lines if "loss" not in line]
    assert [set(line) for line in scores] == [{"step", "single_320", "multikey_320", "chain_320"}] * 2


def test_export_is_a_checkpoint_like_any_other(uninterrupted, tokenizer):
    config, _ = uninterrupted
    folder = Path(config.out) / "hf"
    model, params = load_hf(folder)
    assert model.config.layers == config.model.layers and model.config.model_type == "qwen2"
    assert model.config.eos_ids == (tokenizer.eos_token_id,)
    assert model.config.vocab >= len(tokenizer) and model.config.vocab % 128 == 0
    loaded = load_tokenizer(folder)
    ids = np.asarray([loaded("The magic number for apple is 12")["input_ids"]], np.int32)
    assert ids[0].tolist() == tokenizer("The magic number for apple is 12")["input_ids"]
    assert jax.jit(model.apply)(params, ids).shape == (1, ids.shape[1], model.config.vocab)


@pytest.mark.parametrize("calls", [2, 6], ids=["between checkpoints", "at a checkpoint"])
def test_stopped_and_resumed_is_the_same_run(uninterrupted, stop_at, tmp_path, monkeypatch, capsys, calls):
    config = tiny(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context():
        stop_at(calls)
        assert train_run(config) is None
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"stopped at step {calls} of 9" in capsys.readouterr().out
    assert not (tmp_path / "run" / "hf").exists()
    assert (tmp_path / "run" / "checkpoints" / str(calls)).is_dir()
    assert train_run(config) == tmp_path / "run" / "hf"
    assert f"starting at step {calls}" in capsys.readouterr().out
    assert metrics(config) == uninterrupted[1]
