"""One process of a run on two hosts: `python -m tests.train.many_hosts FOLDER TOKENIZER PORT INDEX [EVENT STEP]`.

When it begins step STEP, the process kills itself (EVENT `die`) or is told to stop (`stop`).
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from recycled_jax.distributed import Distributed
from recycled_jax.mesh import MeshSizes
from recycled_jax.tasks.prose import generated_sentences
from tests.train import tiny_run
from train.config import Evaluation, Stage, TrainConfig
from train.loop import train

EVALUATED = Evaluation(every=3, examples=3, length=96, retrieval=False, scored=8, strides=(4,))


def config(folder: Path) -> TrainConfig:
    """Six steps on text, with rows, weights and tokens spread over all devices, each host with its own stream."""
    tiny = tiny_run.many_steps(folder)
    tiny_run.write_once(folder / "held_out.txt", " ".join(generated_sentences(np.random.default_rng(7), 40)))
    return dataclasses.replace(
        tiny,
        mesh=MeshSizes(data=2, fsdp=2, sequence=2),
        stages=(Stage(length=96, batch=8, steps=6),),
        evaluation=dataclasses.replace(EVALUATED, texts=(str(folder / "held_out.txt"),)),
        save_every=3,
    )


if __name__ == "__main__":
    folder, tokenizer, port, index, *event = sys.argv[1:]
    hosts = Distributed(f"localhost:{port}", processes=2, process=int(index), heartbeat=30)
    ours = dataclasses.replace(config(Path(folder)), distributed=hosts)
    what, step = event or ("die", "0")  # steps count from 1

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        tiny_run.little_text(AutoTokenizer.from_pretrained(tokenizer)),
        tiny_run.at_step(int(step), {"die": die, "stop": tiny_run.send_sigterm}[what]),
    ):
        train(ours)
