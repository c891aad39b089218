"""Retrieval under several policies: `python -m eval.retrieval --lengths '[4096, 8192]' --out results.json`.

The share of fresh examples answered exactly, greedy, in percent, and a 95 % bootstrap interval; every policy sees the
same examples. Written as JSON and printed as a Markdown table.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from tqdm import tqdm

from eval.provenance import provenance
from recycled_jax.commands.loading import Checkpoint
from recycled_jax.generate import generate, read
from recycled_jax.policies import Policy, make_policy
from recycled_jax.tasks.retrieval import TASKS, make_example, score

POLICIES: dict[str, Policy] = {
    "full": make_policy("full"),
    "recycled": make_policy("recycled", k=256, stride=8),
    "recycled, refresh=selection": make_policy("recycled", k=256, stride=8, refresh="selection"),
    "recycled-dynamic": make_policy("recycled-dynamic", k=256, stride=8),
    "streaming": make_policy("streaming", k=256),
}


def evaluate(
    out: Path,
    lengths: list[int] = [4096],  # noqa: B006  (a default for the command line, never changed)
    tasks: list[str] = ["single", "multikey", "chain"],  # noqa: B006
    policies: list[str] = list(POLICIES),  # noqa: B006
    examples: int = 100,
    seed: int = 2026,
    batch: int = 10,
    model: str | None = None,
) -> None:
    """Args as in the module's text; `model` is the embedded one when not given."""
    checkpoint = Checkpoint.find(model)
    network, params = checkpoint.load("float32")
    cells: list[dict] = []
    total = len(lengths) * len(tasks) * len(policies) * -(-examples // batch)
    with tqdm(total=total, unit="batch") as progress:
        for length in lengths:
            for task in tasks:
                scores = {name: [] for name in policies}
                for first in range(0, examples, batch):
                    questions = [
                        make_example(TASKS[task], length=length, seed=seed, index=i, encode=checkpoint.text.encode)
                        for i in range(first, min(first + batch, examples))
                    ]
                    prompts = [checkpoint.text.encode(example.prompt) for example in questions]
                    new_tokens = max(example.gen_tokens for example in questions)
                    prefilled = read(network, params, prompts, max_new_tokens=new_tokens, capacity=length + 128)
                    for name in policies:
                        progress.set_description(f"{name} {task} {length}")
                        done = generate(
                            network, params, prefilled, policy=POLICIES[name], max_new_tokens=new_tokens, block=16
                        )
                        answers = [checkpoint.text.decode(tokens) for tokens in done.tokens]
                        scores[name] += [score(*pair) for pair in zip(questions, answers, strict=True)]
                        progress.update()
                cells += [_cell(name, task, length, np.array(scores[name])) for name in policies]
                out.write_text(json.dumps({**provenance(), "seed": seed, "cells": cells}, indent=1) + "\n")
    print(table(cells))


def _cell(policy: str, task: str, length: int, scores: np.ndarray) -> dict:
    low, high = _interval(scores)
    score = {"n": len(scores), "score": 100 * float(scores.mean()), "interval": [low, high]}
    return {"policy": policy, "task": task, "length": length, **score}


def table(cells: Sequence[dict]) -> str:
    """Policies as rows, task and length as columns."""
    columns = list(dict.fromkeys((cell["task"], cell["length"]) for cell in cells))
    scores = {(cell["policy"], cell["task"], cell["length"]): cell["score"] for cell in cells}
    lines = [
        "| policy | " + " | ".join(f"{task} {length}" for task, length in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for policy in dict.fromkeys(cell["policy"] for cell in cells):
        row = (scores.get((policy, *column)) for column in columns)
        lines.append(f"| {policy} | " + " | ".join("" if s is None else f"{s:.0f}" for s in row) + " |")
    return "\n".join(lines)


def _interval(scores: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap over examples, in percent."""
    draws = np.random.default_rng(0).choice(scores, size=(10_000, len(scores))).mean(axis=1)
    low, high = np.percentile(100 * draws, [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    auto_cli(evaluate, as_positional=False)
