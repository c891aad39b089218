"""Scores of runs side by side: `python -m train.compare --runs '{causal: [runs/a, runs/b], recycled: [runs/c]}'`.

Prints a Markdown table: the scores before the first step, if the runs have them, and after the last one, as the mean
and the range over the runs of a name, which usually differ in their seed. `--out FILE` keeps what it is made of as
JSON, and `--scores FILE` makes the table of that.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli


def compare(runs: dict[str, list[str]] = {}, out: Path | None = None, scores: Path | None = None) -> None:  # noqa: B006
    """Args as in the module's text. Raises ValueError for runs without scores, or that cannot be compared."""
    found = json.loads(scores.read_text()) if scores else {name: [ends(run) for run in runs[name]] for name in runs}
    if not found or not all(found.values()):
        raise ValueError(f"runs={runs} has a name without runs; expected at least one run for each")
    told = {(of_run["steps"], *of_run["after"]) for of_name in found.values() for of_run in of_name}
    if len(told) > 1:
        raise ValueError(f"runs end at different steps, or with different scores: {sorted(told)}")
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


def ends(run: str) -> dict[str, Any]:
    """The scores of a run `before` its first step, if there are any, and `after` its last, with its number `steps`."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scored = [line for line in lines if "loss" not in line]
    if not scored:
        raise ValueError(f"runs: {run!r} has no scores; expected a run with an evaluation")
    of_step = {line.pop("step"): line for line in scored}
    last = max(of_step)
    first = {"before": of_step[0]} if 0 in of_step and last > 0 else {}
    return {"steps": last, **first, "after": of_step[last]}


def markdown(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line for the model before training, and one for each name."""
    runs = [run for of_name in found.values() for run in of_name]
    names = list(runs[0]["after"])
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * (len(names) + 1) + "|"]
    before = [run["before"] for run in runs if "before" in run]
    rows = {"before": before} if before else {}
    rows |= {f"{name} ({len(of_name)})": [run["after"] for run in of_name] for name, of_name in found.items()}
    for name, scored in rows.items():
        cells = []
        for of in names:
            values = np.array([scores[of] for scores in scored])
            span = f" ({values.min():.2f}–{values.max():.2f})" if np.ptp(values) > 0 else ""
            cells.append(f"{values.mean():.2f}{span}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        auto_cli(compare, as_positional=False)
    except (ValueError, OSError) as error:
        print(f"train.compare: {error}", file=sys.stderr)
        sys.exit(2)
