"""A run on text with all that can be asked of one: it goes on after a stop as if there had been none."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from recycled_jax.config import LlamaConfig
from recycled_jax.hf import load_hf
from recycled_jax.mesh import make_mesh
from recycled_jax.model import Llama
from recycled_jax.recycled_attention import RecycledAttention
from recycled_jax.tasks.prose import generated_sentences
from tests.train import tiny_run
from tests.train.test_loop import metrics
from train.checkpoint import Checkpoints
from train.config import Corpus, Evaluation, Source, Stage, TrainConfig
from train.loop import train
from train.optimizer import averaged, make_optimizer
from train.step import abstract_state

STEPS = 6
EVALUATED = Evaluation(every=3, examples=2, length=96, retrieval=False, scored=8, strides=(4,))


def config(folder: Path) -> TrainConfig:
    folder.mkdir()
    rng = np.random.default_rng(0)
    documents = [json.dumps({"text": " ".join(generated_sentences(rng, 12))}) for _ in range(20)]
    (folder / "documents.jsonl").write_text("\n".join([*documents[:7], '{"text": ', *documents[7:]]) + "\n")
    (folder / "held_out.txt").write_text(" ".join(generated_sentences(rng, 40)))
    tiny = tiny_run.config(folder)
    recycled = RecycledAttention(k=16, stride=8, chunks=4)
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, recycled=recycled),
        corpus=Corpus((Source(str(folder / "*.jsonl")),), streams=2),
        stages=(Stage(length=96, batch=8, steps=STEPS),),
        evaluation=dataclasses.replace(EVALUATED, texts=(str(folder / "held_out.txt"),)),
        save_every=2,
        keep=1,
        keep_every=4,
        tensorboard=True,
        profile=(2, 4),
        remat="dots",
        ema=0.5,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> TrainConfig:
    asked = config(tmp_path_factory.mktemp("text") / "run")
    with pytest.warns(UserWarning, match=r"left out .*documents.jsonl:8: "):
        train(asked)
    return asked


def test_what_it_leaves(finished):
    out = Path(finished.out)
    lines = metrics(finished)
    scores = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in scores] == [3, STEPS]
    assert all(line.keys() == {"step", "perplexity_full", "perplexity_stride_4"} for line in scores)
    assert scores[1]["perplexity_full"] < scores[0]["perplexity_full"]
    assert len(list((out / "tensorboard").glob("events*"))) == 1
    assert list((out / "profile").rglob("*.xplane.pb"))
    assert sorted(path.name for path in (out / "checkpoints").iterdir() if path.name.isdigit()) == ["4", "6"]


def test_the_export_is_the_average(finished):
    _, exported = load_hf(Path(finished.out) / "hf")
    model = Llama(LlamaConfig.from_hf(Path(finished.out) / "model"))
    optimizer = make_optimizer(finished.optimizer, model.config, STEPS, ema=finished.ema)
    with Checkpoints(finished) as checkpoints:
        saved = checkpoints.restore(abstract_state(model, optimizer, make_mesh(finished.mesh)))
    assert saved is not None and int(saved.state.step) == STEPS
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), exported, averaged(saved.state))
    last = saved.state.params["params"]["final_norm"]
    assert np.abs(np.asarray(last) - np.asarray(exported["params"]["final_norm"])).max() > 1e-5


@pytest.mark.filterwarnings("ignore:left out")
def test_it_goes_on_where_it_was_stopped(finished, tmp_path):
    asked = config(tmp_path / "run")
    for step in (3, 2):  # the second is the fifth of all
        with tiny_run.at_step(step, tiny_run.send_sigterm):
            assert train(asked) is None
    assert train(asked) == Path(asked.out) / "hf"
    assert metrics(asked) == metrics(finished)


def test_too_few_documents(tmp_path):
    asked = config(tmp_path / "run")
    (tmp_path / "run" / "documents.jsonl").write_text('{"text": "The end."}\n')
    with pytest.raises(ValueError, match=r"has 1 documents in 1 files, none of them for stream 1"):
        train(asked)


@pytest.mark.parametrize(("streams", "message"), [(3, "data x fsdp = 8 devices"), (16, "batch=8 must be a multiple")])
def test_streams_that_the_batch_cannot_share(tmp_path, streams, message):
    asked = config(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(asked, corpus=dataclasses.replace(asked.corpus, streams=streams)))
    assert not Path(asked.out).exists()
