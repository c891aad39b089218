"""A run of nine steps that takes seconds; as a program, one that is killed in the middle of it."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train.data
import train.loop
import train.start
from recycled_jax.tasks.prose import generated_sentences
from train.config import Corpus, Data, Evaluation, ModelSizes, Optimizer, Source, Stage, TrainConfig


def config(folder: Path) -> TrainConfig:
    """Two stages, a checkpoint after every third step, each of the eight devices with a row of the batch."""
    return TrainConfig(
        out=str(folder / "run"),
        model=ModelSizes(
            init="plain", embed=32, mlp=32, layers=2, query_heads=4, kv_heads=2, head_dim=16, max_length=512
        ),
        data=Data(max_position=512),
        optimizer=Optimizer(name="adamw", warmup=2),
        stages=(Stage(length=96, batch=8, steps=4, facts=2), Stage(length=160, batch=8, steps=5, facts=3)),
        save_every=3,
        evaluation=Evaluation(every=6, examples=1, length=320),
        log_every=1,
    )


def many_steps(folder: Path) -> TrainConfig:
    """Two hundred steps on a corpus of a hundred documents, a checkpoint after every second one, nothing evaluated."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [" ".join(generated_sentences(np.random.default_rng(i), 1 + i % 30)) for i in range(100)]
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    write_once(folder / "documents.jsonl", "".join(lines))
    return replace(
        config(folder),
        corpus=Corpus((Source(str(folder / "documents.jsonl")),), streams=2),
        stages=(Stage(length=96, batch=8, steps=200),),
        evaluation=Evaluation(retrieval=False),
        save_every=2,
    )


def write_once(path: Path, text: str) -> None:
    """The other process of a run may be reading it."""
    if not path.exists():
        path.write_text(text)


@contextmanager
def little_text(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Runs use `tokenizer` instead of training one, and tokenize 300 generated sentences instead of 20,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data, "generated_sentences", lambda rng, count: generated_sentences(rng, min(count, 300)))
        patch.setattr(train.start, "train_tokenizer", lambda sentences, merges: tokenizer)
        yield


@contextmanager
def at_step(number: int, event: Callable[[], None]) -> Iterator[None]:
    """Calls `event` when a run begins its step `number`, counted from 1 where the run begins."""
    make_train_step = train.loop.make_train_step

    def make(*arguments, **knobs):
        step_fn = make_train_step(*arguments, **knobs)
        calls = iter(range(1, 1_000_000))

        def step(state, batch):
            if next(calls) == number:
                event()
            return step_fn(state, batch)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "make_train_step", make)
        yield


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run = config(Path(sys.argv[1]))

    def die() -> None:
        while not (Path(run.out) / "checkpoints" / "3").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    with little_text(AutoTokenizer.from_pretrained(sys.argv[2])):
        if sys.argv[3:] == ["many"]:
            train.loop.train(many_steps(Path(sys.argv[1])))
        else:
            with at_step(6, die):
                train.loop.train(run)
