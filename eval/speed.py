"""Time of a decode step, full against recycled: `python -m eval.speed --lengths '[4096, 16384]' --out speed.json`.

One row, one process. For each length: full, the two kinds of step of the recycled policy alone, the policy as it runs
(with both kinds of refresh), and full again, whose drift tells how quiet the machine was. The floor of a step is the
bytes it must read, weights once and the keys and values of the schedule, at the rate at which this machine reads
memory in the same run.
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
from recycled_jax.commands.measure import measure
from recycled_jax.frame import AttentionScorer, Never, Recycling, TopK
from recycled_jax.generate import read
from recycled_jax.policies import Policy, make_policy
from recycled_jax.tasks.prose import generated_sentences


def speed(
    out: Path,
    lengths: list[int] = [4096, 8192, 16384],  # noqa: B006  (a default for the command line, never changed)
    k: int = 512,
    stride: int = 10,
    strides: int = 2,
    blocks: int = 22,
    model: str | None = None,
) -> None:
    """`blocks` blocks of `strides` × `stride` steps, the first not timed; `model`: the embedded one when not given."""
    checkpoint = Checkpoint.find(model)
    network, params = checkpoint.load("float32")
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rate = _read_rate()
    sentences = generated_sentences(np.random.default_rng(0), max(lengths) // 4)
    tokens = checkpoint.text.encode(" ".join(sentences))
    policies = {
        "full": make_policy("full"),
        "recycled_step": Policy("recycled steps only", Recycling(AttentionScorer(), TopK(k, pool=7), Never())),
        "refresh_step": make_policy("recycled", k=k, stride=1),
        "recycled": make_policy("recycled", k=k, stride=stride),
        "recycled_score_only": make_policy("recycled", k=k, stride=stride, refresh="selection"),
        "full_again": make_policy("full"),
    }
    cells = []
    for length in lengths:
        prompt = (tokens * -(-length // len(tokens)))[:length]

        prefilled = read(network, params, [prompt], max_new_tokens=strides * stride * blocks + 1)
        steps = {
            name: measure(network, params, prefilled, policy=policy, block=strides * stride, blocks=blocks)
            for name, policy in policies.items()
        }
        full = min(steps["full"].step_seconds, steps["full_again"].step_seconds)
        for name, step in steps.items():
            floor = (weight_bytes + step.kv_bytes) / rate
            cells.append(
                {
                    "kind": "measured",
                    "length": length,
                    "step": name,
                    "ms": 1e3 * step.step_seconds,
                    "floor_ms": 1e3 * floor,
                    "kv_bytes": step.kv_bytes,
                    "ratio_to_full": full / step.step_seconds,
                    "ideal_ratio": (weight_bytes + steps["full"].kv_bytes) / (weight_bytes + step.kv_bytes),
                }
            )
        print(table([cell for cell in cells if cell["length"] == length]))
    result = {**provenance(), "policy": {"name": "recycled", "k": k, "stride": stride}, "batch": 1, "dtype": "float32"}
    result |= {"weight_bytes": weight_bytes, "read_bytes_per_second": rate, "cells": cells}
    out.write_text(json.dumps(result, indent=1) + "\n")


def table(cells: list[dict]) -> str:
    """Markdown, a row per kind of step."""
    lines = ["| context | step | ms | floor ms | KV read | x full | x full by bytes |", "|---" * 7 + "|"]
    lines += [
        f"| {c['length']} | {c['step']} | {c['ms']:.2f} | {c['floor_ms']:.2f} | {c['kv_bytes'] / 1e6:.1f} MB "
        f"| {c['ratio_to_full']:.1f} | {c['ideal_ratio']:.1f} |"
        for c in cells
    ]
    return "\n".join(lines)


def _read_rate() -> float:
    """Bytes per second at which a large array is read, best of 10."""
    source = jnp.ones(1 << 26, jnp.float32)
    total = jax.jit(jnp.sum)
    jax.block_until_ready(total(source))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(total(source))
        best = min(best, time.perf_counter() - started)
    return source.nbytes / best


if __name__ == "__main__":
    auto_cli(speed, as_positional=False)
