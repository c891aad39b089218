"""Two processes of four devices, over loopback: the run of one process with eight; and what is left when one dies."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from recycled_jax.hf import load_hf
from tests.train import many_hosts
from train.loop import train

ROOT = Path(__file__).parents[2]
BOUND = 60  # seconds in which a process has to end when the other one has died; heartbeats are 10 s


@pytest.fixture
def start(tmp_path, tokenizer):
    """Starts a process of a run in a folder; all are killed at the end."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    four = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")

    def process(folder: Path, index: int, *dies_at: str) -> subprocess.Popen:
        arguments = [str(folder), str(tmp_path / "tokenizer"), str(port), str(index), *dies_at]
        command = [sys.executable, "-m", "tests.train.many_hosts", *arguments]
        children.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "XLA_FLAGS": four},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return children[-1]

    yield process
    for child in children:
        child.kill()
        child.communicate()


def scalars(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "_per_" not in name} for line in lines]


def test_two_hosts_give_the_losses_of_one(tmp_path, start):
    children = [start(tmp_path / "two", index) for index in range(2)]
    for child in children:
        output, _ = child.communicate(timeout=300)
        assert child.returncode == 0, output
    train(many_hosts.config(tmp_path / "one"))
    two, one = scalars(tmp_path / "two"), scalars(tmp_path / "one")
    assert len(two) == len(one) == 9
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=1e-5)
    _, params = load_hf(tmp_path / "two" / "run" / "hf")
    _, expected = load_hf(tmp_path / "one" / "run" / "hf")
    np.testing.assert_allclose(params["params"]["embed_tokens"], expected["params"]["embed_tokens"], atol=1e-5)


def test_when_one_host_dies_the_other_ends(tmp_path, start):
    left, dying = start(tmp_path / "two", 0), start(tmp_path / "two", 1, "6")
    dying.communicate(timeout=300)
    died = time.monotonic()
    output, _ = left.communicate(timeout=BOUND)
    assert time.monotonic() - died < BOUND
    assert left.returncode != 0
    assert (tmp_path / "two" / "run" / "checkpoints" / "3").is_dir(), output  # to go on from
