"""What the demo shows: a table, one question with its answers, two CSV files and a picture."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recycled_jax.commands.measure import Measurement
from recycled_jax.plots import decode_times, looks, new_figure, scores_against_bytes
from recycled_jax.tasks.example import Example
from recycled_jax.tasks.retrieval import score

SHOWN = 60  # characters of an answer


@dataclass(frozen=True)
class PolicyRow:
    """A policy on all tasks: accuracy by task (0 to 1), seconds per decode step of a batch, KV bytes read per token and
    row."""

    policy: str
    accuracy: dict[str, float]
    step_seconds: float
    kv_bytes: float
    dense_kv_bytes: float
    effective_stride: float

    @classmethod
    def summarize(cls, policy: str, accuracy: dict[str, float], measured: Sequence[Measurement]) -> "PolicyRow":
        refreshes = sum(one.refreshes for one in measured)
        return cls(
            policy,
            accuracy,
            statistics.median(one.step_seconds for one in measured),
            statistics.mean(one.kv_bytes for one in measured),
            statistics.mean(one.dense_kv_bytes for one in measured),
            sum(one.steps for one in measured) / refreshes if refreshes else float("inf"),
        )


@dataclass(frozen=True)
class SpeedRow:
    """One row decoded after `context` tokens."""

    policy: str
    context: int
    measured: Measurement


@dataclass(frozen=True)
class AnsweredExample:
    """A question and what every policy answered."""

    example: Example
    answers: dict[str, str]


def write_report(
    out: Path,
    rows: Sequence[PolicyRow],
    speeds: Sequence[SpeedRow],
    shown: AnsweredExample,
    *,
    context: int,
    batch: int,
) -> None:
    """Prints table and example, and writes `demo.csv`, `demo_speed.csv` and `demo.png` into the folder `out`. The first
    row is the one the others' speed is compared with."""
    records = [_record(row, rows[0], batch) for row in rows]
    print(_table(records))
    print(
        f"\n{batch} rows of {context} tokens at a time: tokens/s counts all of them, KV bytes one of them. "
        "Stride: decode\nsteps per refresh, as observed."
    )
    print(_example(shown))
    _write_csv(out / "demo.csv", records)
    _write_csv(
        out / "demo_speed.csv",
        [
            {
                "policy": speed.policy,
                "context": speed.context,
                "ms_per_token": round(speed.measured.step_seconds * 1e3, 4),
                "kv_bytes_per_token": round(speed.measured.kv_bytes),
            }
            for speed in speeds
        ],
    )
    _picture(rows, speeds, f"{batch} rows of {context:,} tokens").savefig(out / "demo.png", dpi=150)
    print(f"\nWritten: {out / 'demo.csv'}, {out / 'demo_speed.csv'}, {out / 'demo.png'}")


def _record(row: PolicyRow, baseline: PolicyRow, batch: int) -> dict[str, Any]:
    """A row of `demo.csv`."""
    return {
        "policy": row.policy,
        **{f"accuracy_{task}": value for task, value in row.accuracy.items()},
        "tokens_per_second": round(batch / row.step_seconds, 2),
        "speed_ratio_to_full": round(baseline.step_seconds / row.step_seconds, 3),
        "kv_bytes_per_token": round(row.kv_bytes),
        "dense_kv_bytes_per_token": round(row.dense_kv_bytes),
        "effective_stride": round(row.effective_stride, 3),
    }


def _table(records: Sequence[dict[str, Any]]) -> str:
    tasks = [name for name in records[0] if name.startswith("accuracy_")]
    header = ["policy", *(task.removeprefix("accuracy_") for task in tasks)]
    lines = [[*header, "tokens/s", "vs full", "KV read/token", "of dense", "stride"]]
    for record in records:
        stride = record["effective_stride"]
        lines.append(
            [
                record["policy"],
                *(f"{record[task]:.0%}" for task in tasks),
                f"{record['tokens_per_second']:.1f}",
                f"{record['speed_ratio_to_full']:.2f}x",
                f"{record['kv_bytes_per_token'] / 1e6:.3f} MB",
                f"{record['kv_bytes_per_token'] / record['dense_kv_bytes_per_token']:.1%}",
                "never" if stride == float("inf") else f"{stride:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _example(shown: AnsweredExample) -> str:
    example = shown.example
    fact = f"{example.answer_prefix}{example.gold}"
    depth = example.context.index(fact) / len(example.context)
    width = max(map(len, shown.answers))
    lines = [f"\nOne of the questions. Hidden {depth:.0%} into the text: {fact}"]
    lines.append(f"Asked at its end: {example.question.strip()} {example.answer_prefix}")
    for policy, answer in shown.answers.items():
        verdict = "right" if score(example, answer) == 1 else "wrong"
        text = " ".join(answer.split())
        text = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
        lines.append(f"  {policy.ljust(width)}  {verdict}  {text}")
    return "\n".join(lines)


def _write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def _picture(rows: Sequence[PolicyRow], speeds: Sequence[SpeedRow], questions: str) -> Figure:
    dense = rows[0].policy
    styles = looks([row.policy for row in rows], dense)
    seconds: dict[str, dict[int, float]] = {}
    for speed in speeds:
        seconds.setdefault(speed.policy, {})[speed.context] = speed.measured.step_seconds
    scores = {row.policy: row.accuracy for row in rows}
    figure = new_figure(13, 3.8)
    left, right = figure.subfigures(1, 2, squeeze=False).flat
    scores_against_bytes(left, scores, {row.policy: row.kv_bytes for row in rows}, styles=styles, origin=questions)
    decode_times(right, seconds, dense=dense, styles=styles, origin="one row")
    return figure
