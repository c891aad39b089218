"""What rounding costs: `python -m eval.cache_dtypes --out docs/cache_dtypes.json`.

The same questions in every combination of a dtype of computation and one of the cache: the logits of each prompt's last
token beside those of float32, and the share of answers that are right, greedy. Written as JSON and printed as a
Markdown table.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonargparse import auto_cli
from scipy.special import log_softmax
from tqdm import tqdm

from eval.provenance import provenance
from recycled_jax.commands.loading import Checkpoint
from recycled_jax.generate import generate, read
from recycled_jax.policies import Policy, make_policy
from recycled_jax.state import CacheDtype
from recycled_jax.tasks.retrieval import TASKS, make_example, score

POLICIES: dict[str, Policy] = {"full": make_policy("full"), "recycled": make_policy("recycled", k=256, stride=8)}


class Kind(NamedTuple):
    """Weights and computation in `dtype`; the cache as well, or in `cache`."""

    dtype: str
    cache: CacheDtype | None

    def __str__(self) -> str:
        return f"{self.dtype}, {self.cache or self.dtype} cache"


EXACT = Kind("float32", None)
KINDS = (EXACT, Kind("float32", "int8"), Kind("bfloat16", None), Kind("bfloat16", "int8"))


def compare(
    out: Path,
    length: int = 4096,
    tasks: list[str] = list(TASKS),  # noqa: B006  (a default for the command line, never changed)
    examples: int = 100,
    seed: int = 2026,
    batch: int = 10,
    model: str | None = None,
) -> None:
    """Args as in the module's text; `examples` for each of the tasks, `model` the embedded one when not given."""
    checkpoint = Checkpoint.find(model)
    batches = [(task, range(at, min(at + batch, examples))) for task in tasks for at in range(0, examples, batch)]
    logits: dict[Kind, list[np.ndarray]] = {}
    scores: dict[tuple[Kind, str, str], list[float]] = {}
    with tqdm(total=len(KINDS) * len(batches), unit="batch") as progress:
        for kind in KINDS:
            network, params = checkpoint.load(kind.dtype)
            for task, indices in batches:
                progress.set_description(f"{kind}: {task}")
                questions = [
                    make_example(TASKS[task], length=length, seed=seed, index=index, encode=checkpoint.text.encode)
                    for index in indices
                ]
                prompts = [checkpoint.text.encode(question.prompt) for question in questions]
                new = max(question.gen_tokens for question in questions)
                options = {"max_new_tokens": new, "capacity": length + 128, "cache_dtype": kind.cache}
                prefilled = read(network, params, prompts, **options)
                logits.setdefault(kind, []).append(np.asarray(prefilled.prompts.logits, np.float64))
                for name, policy in POLICIES.items():
                    done = generate(network, params, prefilled, policy=policy, max_new_tokens=new, block=16)
                    answers = [checkpoint.text.decode(tokens) for tokens in done.tokens]
                    scores.setdefault((kind, name, task), []).extend(map(score, questions, answers))
                progress.update()
    exact = np.concatenate(logits[EXACT])
    rows = [
        {
            "dtype": kind.dtype,
            "cache": kind.cache or kind.dtype,
            "logits": error(np.concatenate(logits[kind]), exact),
            "scores": {
                name: {task: 100 * float(np.mean(scores[kind, name, task])) for task in tasks} for name in POLICIES
            },
        }
        for kind in KINDS
    ]
    spread = {"prompts": len(exact), "logits_std": float(exact.std()), "logits_max": float(np.abs(exact).max())}
    told = {**provenance(), "length": length, "examples": examples, "seed": seed, **spread, "kinds": rows}
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(table(rows))


def error(logits: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Of [prompts, vocabulary]: the largest and the mean distance, the mean divergence of the distributions (KL from
    the exact one, nats), and the share of prompts with the same likeliest token."""
    distance = np.abs(logits - exact)
    ours, theirs = log_softmax(logits, axis=-1), log_softmax(exact, axis=-1)
    return {
        "max": float(distance.max()),
        "mean": float(distance.mean()),
        "kl": float(np.mean(np.sum(np.exp(theirs) * (theirs - ours), axis=-1))),
        "same_token": float(np.mean(logits.argmax(axis=-1) == exact.argmax(axis=-1))),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each kind."""
    tasks = [(policy, task) for policy, of in rows[0]["scores"].items() for task in of]
    head = ["computation", "cache", "logits: max", "mean", "KL", "same token", *(f"{p} {t}" for p, t in tasks)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        found = row["logits"]
        told = [f"{found['max']:.3f}", f"{found['mean']:.4f}", f"{found['kl']:.1e}", f"{found['same_token']:.0%}"]
        right = [f"{row['scores'][policy][task]:.1f}" for policy, task in tasks]
        lines.append(f"| {' | '.join([row['dtype'], row['cache'], *told, *right])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    auto_cli(compare, as_positional=False)
