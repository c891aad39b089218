"""Whole runs of nine steps: stopped, killed, resumed, refused, exported."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from recycled_jax.hf import load_hf
from recycled_jax.mesh import MeshSizes
from recycled_jax.tokenizer import load_tokenizer
from tests.train import tiny_run
from train.checkpoint import Checkpoints
from train.config import Data, Evaluation, Optimizer, Stage, TrainConfig
from train.data import RetrievalMixture
from train.loop import train

ROOT = Path(__file__).parents[2]
SPEED = ("tokens_per_second", "seconds_per_step")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> TrainConfig:
    """The config of a run that nothing has disturbed."""
    config = tiny_run.config(tmp_path_factory.mktemp("finished"))
    assert train(config) == Path(config.out) / "hf"
    return config


def metrics(config: TrainConfig) -> list[dict]:
    """The logged lines, without how fast they were computed."""
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


def test_metrics_of_a_run(finished):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 9]
    losses = [line for line in lines if "loss" in line]
    assert [line["length"] for line in losses] == [96] * 4 + [160] * 5
    assert all(np.isfinite(list(line.values())).all() for line in losses)
    scores = [line for line in lines if "loss" not in line]
    assert [set(line) for line in scores] == [{"step", "single_320", "multikey_320", "chain_320"}] * 2


def test_export_is_a_checkpoint_like_any_other(finished, tokenizer):
    folder = Path(finished.out) / "hf"
    model, params = load_hf(folder)
    assert (model.config.model_type, model.config.layers) == ("qwen2", finished.model.layers)
    assert model.config.vocab >= len(tokenizer) and model.config.vocab % 128 == 0
    assert (model.config.bos_id, model.config.eos_ids) == (tokenizer.bos_token_id, (tokenizer.eos_token_id,))
    ids = load_tokenizer(folder)("The magic number for apple is 12")["input_ids"]
    assert ids == tokenizer("The magic number for apple is 12")["input_ids"]
    logits = jax.jit(model.apply)(params, np.asarray([ids], np.int32))
    assert logits.shape == (1, len(ids), model.config.vocab)


@pytest.mark.parametrize("step", [2, 6], ids=["between checkpoints", "at a checkpoint"])
def test_stopped_by_sigterm_and_resumed_is_the_same_run(finished, tmp_path, capsys, step):
    config = tiny_run.config(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    with tiny_run.at_step(step, tiny_run.send_sigterm):
        assert train(config) is None
    assert signal.getsignal(signal.SIGTERM) is handler
    assert f"stopped at step {step} of 9" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    assert not (tmp_path / "run" / "hf").exists()
    assert train(config) == tmp_path / "run" / "hf"
    assert f"starting at step {step}" in capsys.readouterr().out
    assert metrics(config) == metrics(finished)


def test_sigterm_in_the_last_step_changes_nothing(finished, tmp_path):
    config = tiny_run.config(tmp_path)
    with tiny_run.at_step(9, tiny_run.send_sigterm):
        assert train(config) == tmp_path / "run" / "hf"
    assert metrics(config) == metrics(finished)


def test_killed_and_resumed_is_the_same_run(finished, tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "tests.train.tiny_run", str(tmp_path), str(tmp_path / "tokenizer")]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    config = tiny_run.config(tmp_path)
    assert [line["step"] for line in metrics(config)] == [1, 2, 3, 4, 5]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')  # a line that was being written
    train(config)
    assert "starting at step 3" in capsys.readouterr().out
    assert metrics(config) == metrics(finished)


def test_a_finished_run_is_exported_again(finished, tmp_path):
    before = metrics(finished)
    shutil.rmtree(Path(finished.out) / "hf")
    assert train(finished) == Path(finished.out) / "hf"
    assert metrics(finished) == before
    load_hf(Path(finished.out) / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "holds a run with another seed: 0 there, 1 here"),
        (
            {"optimizer": Optimizer(name="adamw", warmup=3)},
            "holds a run with another optimizer.warmup: 2 there, 3 here",
        ),
        ({"stages": (Stage(length=96, batch=8, steps=4),)}, "holds a run with another stages: "),
        ({"dtype": "bfloat16"}, "holds a run with another dtype: 'float32' there, 'bfloat16' here"),
    ],
)
def test_refuses_the_folder_of_another_run(finished, change, message):
    before = metrics(finished)
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(finished, **change))
    assert metrics(finished) == before


def test_a_run_that_never_began_can_be_corrected(finished, tmp_path):
    config = tiny_run.config(tmp_path)
    wrong = dataclasses.replace(config, seed=5, evaluation=Evaluation(length=60))
    with pytest.raises(ValueError, match="length=60 is too short"):
        train(wrong)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 5
    train(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0
    assert metrics(config) == metrics(finished)


def test_a_run_whose_loss_is_never_finite_ends_with_its_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(tiny_run.config(tmp_path), max_skipped=2)
    mixture_batch = RetrievalMixture.batch

    def batch(self, step, stage):
        made = mixture_batch(self, step, stage)
        return made if step < 4 else made._replace(weights=np.full_like(made.weights, np.inf))

    monkeypatch.setattr(RetrievalMixture, "batch", batch)
    with pytest.raises(FloatingPointError, match=r"step 6: the loss or .* not finite in the last 2 steps"):
        train(config)
    with closing(Checkpoints(config)) as checkpoints:
        assert checkpoints.step == 3


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage(96, batch=6, steps=1), "batch=6 must be a multiple of data x fsdp = 4 devices"),
        (Stage(96, batch=4, steps=1, accumulate=2), "batch=4 .* 4 devices x accumulate=2"),
    ],
    ids=["whole", "in parts"],
)
def test_batches_that_the_mesh_cannot_share(tmp_path, stage, message):
    config = dataclasses.replace(tiny_run.config(tmp_path), mesh=MeshSizes(data=-1, tensor=2))
    config = dataclasses.replace(config, stages=(*config.stages, stage))
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "novel.txt"),
        (b"caf\xe9.", ValueError, "data.texts=.*novel.txt' is not UTF-8 text: byte 3 is invalid"),
        (b" ", ValueError, "data.texts=.*novel.txt' is empty"),
    ],
)
def test_bad_texts(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "novel.txt").write_bytes(content)
    config = tiny_run.config(tmp_path)
    with pytest.raises(error, match=message):
        train(dataclasses.replace(config, data=Data(texts=(str(tmp_path / "novel.txt"),))))
    assert not (tmp_path / "run").exists()
