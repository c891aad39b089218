"""One process of a run on two hosts of four devices each: `python -m tests.train.many_hosts FOLDER TOKENIZER PORT INDEX`.

With a step number as the last argument, the process kills itself when it begins that step.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4"

from transformers import AutoTokenizer

from tests.train import tiny_run
from train.config import Distributed, Mesh, TrainConfig
from train.loop import train


def config(folder: Path) -> TrainConfig:
    """Rows, weights and tokens of the tiny run spread over all of its devices."""
    return dataclasses.replace(tiny_run.config(folder), mesh=Mesh(data=2, fsdp=2, sequence=2))


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
