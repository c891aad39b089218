"""What a run does when its disk is full, and how often it may be killed."""

import dataclasses
import json
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.train import tiny_run
from train.checkpoint import Checkpoints
from train.config import Evaluation, TrainConfig
from train.loop import train

ROOT = Path(__file__).parents[2]


def unmeasured(folder: Path) -> TrainConfig:
    return dataclasses.replace(tiny_run.config(folder), evaluation=Evaluation(retrieval=False))


def losses(config: TrainConfig) -> list[tuple[int, float]]:
    text = (Path(config.out) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [(line["step"], line["loss"]) for line in lines]


@contextmanager
def full_disk():
    """No file can grow beyond 8 KB: what writing to a full disk looks like to a process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_stops_the_run_and_the_last_one_still_loads(tmp_path):
    config = unmeasured(tmp_path)
    disk = full_disk()
    with pytest.raises(OSError, match=r"checkpoint.* of step 6"):
        try:
            with tiny_run.at_step(6, disk.__enter__):
                train(config)
        finally:
            disk.__exit__(None, None, None)
    with closing(Checkpoints(config)) as checkpoints:
        assert checkpoints.step == 3
    assert train(config) == tmp_path / "run" / "hf"
    assert [step for step, _ in losses(config)] == list(range(1, 10))


@pytest.mark.slow
def test_killed_ten_times_at_any_moment_is_the_same_run(tmp_path, tokenizer):
    """Each time after some steps, with a checkpoint after every second one, and a random moment more."""
    expected = tiny_run.many_steps(tmp_path / "whole")
    train(expected)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = tiny_run.many_steps(tmp_path)
    command = [sys.executable, "-m", "tests.train.tiny_run", str(tmp_path), str(tmp_path / "tokenizer"), "many"]
    moments, reached, metrics = random.Random(0), [], Path(config.out) / "metrics.jsonl"
    for _ in range(10):
        before = metrics.stat().st_ino if metrics.exists() else 0
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for_steps(child, metrics, before, moments.randint(1, 20))
        time.sleep(moments.uniform(0, 0.3))
        child.kill()
        _, error = child.communicate()
        assert child.returncode == -signal.SIGKILL, error  # else it came to its end: it needs more steps
        reached.append(len(losses(config)))
    assert len(set(reached)) > 5
    train(config)
    assert losses(config) == losses(expected)


def wait_for_steps(child: subprocess.Popen, metrics: Path, before: int, steps: int) -> None:
    """Until a run has logged so many of its own. It begins with a new file, another than `before`, of those that its
    checkpoint covers."""
    kept = None
    while child.poll() is None:
        if metrics.exists() and metrics.stat().st_ino != before:
            logged = metrics.read_bytes().count(b"\n")
            kept = logged if kept is None else kept
            if logged >= kept + steps:
                return
        time.sleep(0.01)
