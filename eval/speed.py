"""Time of a decode step, full against recycled: `python -m eval.speed --lengths '[4096, 16384]' --out speed.json`.

One row, one process; for each length full, recycled, and full again (its drift tells how quiet the machine was). The
floor of a step is the bytes it must read, weights once and the keys and values of the schedule, at the rate at which
this machine copies memory in the same run.
"""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jsonargparse import auto_cli

from eval.provenance import provenance
from recycled_jax.commands.loading import Checkpoint
from recycled_jax.commands.measure import Measurement, measure
from recycled_jax.policies import make_policy
from recycled_jax.tasks.prose import generated_sentences


def speed(
    out: Path,
    lengths: list[int] = [4096, 8192, 16384],  # noqa: B006  (a default for the command line, never changed)
    k: int = 512,
    stride: int = 10,
    blocks: int = 11,
    model: str | None = None,
) -> None:
    """`blocks` blocks of `stride` steps, the first not timed; `model` is the embedded one when not given."""
    checkpoint = Checkpoint.find(model)
    network, params = checkpoint.load("float32")
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    copy_rate = _copy_rate()
    sentences = generated_sentences(np.random.default_rng(0), max(lengths) // 4)
    tokens = checkpoint.text.encode(" ".join(sentences))
    recycled = make_policy("recycled", k=k, stride=stride)
    cells = []
    for length in lengths:

        def run(policy, length=length) -> Measurement:
            return measure(
                network,
                params,
                [(tokens * -(-length // len(tokens)))[:length]],
                policy=policy,
                capacity=length + stride * blocks + 1,
                block=stride,
                blocks=blocks,
            )

        full, ours, again = run(make_policy("full")), run(recycled), run(make_policy("full"))
        floors = [(weight_bytes + m.kv_bytes) / copy_rate for m in (full, ours)]
        cells.append(
            {
                "kind": "measured",
                "length": length,
                "full_ms": 1e3 * full.step_seconds,
                "recycled_ms": 1e3 * ours.step_seconds,
                "full_again_ms": 1e3 * again.step_seconds,
                "ratio": min(full.step_seconds, again.step_seconds) / ours.step_seconds,
                "full_floor_ms": 1e3 * floors[0],
                "recycled_floor_ms": 1e3 * floors[1],
                "ideal_ratio": floors[0] / floors[1],
                "full_kv_bytes": full.kv_bytes,
                "recycled_kv_bytes": ours.kv_bytes,
            }
        )
        print(json.dumps(cells[-1]))
    result = {**provenance(), "policy": {"name": "recycled", "k": k, "stride": stride}, "batch": 1}
    result |= {"weight_bytes": weight_bytes, "copy_bytes_per_second": copy_rate, "cells": cells}
    out.write_text(json.dumps(result, indent=1) + "\n")


def _copy_rate() -> float:
    """Bytes per second of a large copy, counting those read only, best of 10."""
    source = jnp.ones(1 << 26, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(source))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(copy(source))
        best = min(best, time.perf_counter() - started)
    return source.nbytes / best


if __name__ == "__main__":
    auto_cli(speed, as_positional=False)
