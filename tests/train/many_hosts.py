"""One process of a run on two hosts: `python -m tests.train.many_hosts FOLDER TOKENIZER PORT INDEX [STEP]`.

When it begins step STEP, the process kills itself.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from transformers import AutoTokenizer

from tests.train import tiny_run
from train.config import Distributed, Evaluation, Mesh, TrainConfig
from train.loop import train


def config(folder: Path) -> TrainConfig:
    """Rows, weights and tokens of the tiny run spread over all of its devices; not evaluated."""
    unmeasured = Evaluation(retrieval=False)
    return dataclasses.replace(tiny_run.config(folder), mesh=Mesh(data=2, fsdp=2, sequence=2), evaluation=unmeasured)


if __name__ == "__main__":
    folder, tokenizer, port, index, *dies_at = sys.argv[1:]
    hosts = Distributed(f"localhost:{port}", processes=2, process=int(index), heartbeat=10)
    ours = dataclasses.replace(config(Path(folder)), distributed=hosts)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        tiny_run.little_text(AutoTokenizer.from_pretrained(tokenizer)),
        tiny_run.at_step(int(dies_at[0]) if dies_at else 0, die),
    ):
        train(ours)
