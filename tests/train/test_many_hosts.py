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
BOUND = 120  # seconds in which a process has to end when the other one has died; heartbeats are 30 s


@pytest.fixture
def start(tmp_path, tokenizer):
    """Starts a process of a run in a folder; all are killed at the end."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    children, port = [], 0
    four = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")

    def process(folder: Path, index: int, *event: str) -> subprocess.Popen:
        nonlocal port
        if index == 0:  # the coordinator
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
        arguments = [str(folder), str(tmp_path / "tokenizer"), str(port), str(index), *event]
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


def test_two_hosts_stopped_and_resumed_give_the_losses_of_one(tmp_path, start):
    """One host is told to stop, both do; at the end, what they did together is what one process does undisturbed."""
    many_hosts.config(tmp_path / "two")  # writes the text, before any of them reads it
    for events in [[(), ("stop", "2")], [(), ()]]:
        children = [start(tmp_path / "two", index, *event) for index, event in enumerate(events)]
        outputs = [child.communicate(timeout=300)[0] for child in children]
        assert [child.returncode for child in children] == [0, 0], outputs
    assert "starting at step 3" in outputs[0]  # of the stop in step 2, all know in the next one
    train(many_hosts.config(tmp_path / "one"))
    two, one = scalars(tmp_path / "two"), scalars(tmp_path / "one")
    assert [line["step"] for line in two] == [1, 2, 3, 3, 4, 5, 6, 6]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=1e-5)
    _, params = load_hf(tmp_path / "two" / "run" / "hf")
    _, expected = load_hf(tmp_path / "one" / "run" / "hf")
    np.testing.assert_allclose(params["params"]["embed_tokens"], expected["params"]["embed_tokens"], atol=1e-5)


@pytest.mark.slow
def test_when_one_host_dies_the_other_ends(tmp_path, start):
    many_hosts.config(tmp_path / "two")
    left, dying = start(tmp_path / "two", 0), start(tmp_path / "two", 1, "die", "5")
    dying.communicate(timeout=300)
    died = time.monotonic()
    output, _ = left.communicate(timeout=BOUND)
    assert time.monotonic() - died < BOUND
    assert left.returncode != 0
    assert (tmp_path / "two" / "run" / "checkpoints" / "3").is_dir(), output  # to go on from
