"""Runs side by side: every task and length, each run beside the first one, paired by example."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eval.metrics import paired_interval
from eval.read_runs import Cell, Run, labels, read_run

RULER_STYLE = "RULER-style, not comparable with published RULER scores"


@dataclass(frozen=True)
class Change:
    """What a cell has over another one's, with its 95 % interval: points of score, or the ratio of perplexities. `n`
    counts the examples compared; where they are not paired, the smaller of both numbers."""

    value: float
    low: float
    high: float
    n: int


def compare(runs: list[Path], *, form: Literal["md", "csv", "json"], unpaired: bool = False) -> str:
    """Rows of task and length, and for each run its score, the difference to the first run with a 95 % interval, the
    examples in common, the first run's decode time over its own (above 1 is faster), KV bytes read per step and row,
    and the mean effective stride. Perplexities are compared by their ratio. Times are compared only where device and
    batch are the same and the mode is gather.

    Raises ValueError when cells of the same task and length hold different examples, unless `unpaired`, and as
    `read_run`.
    """
    if not runs:
        raise ValueError("runs=[] is empty; expected at least one folder")
    if form not in _FORMS:
        raise ValueError(f"form={form!r} is unknown; expected one of {', '.join(_FORMS)}")
    read = [read_run(path) for path in runs]
    keys = sorted({key for run in read for key in run.cells})
    rows = [_row(read, task, length, paired=not unpaired) for task, length in keys]
    return _FORMS[form](labels(read), rows, unpaired)


def change(ours: Cell, theirs: Cell, *, paired: bool = True) -> Change | None:
    """Of one cell over another; None if they have no example in common. Raises ValueError as `compare`."""
    if paired:
        check_same_examples(ours, theirs)
    mine, other = _values(ours), _values(theirs)
    if paired:
        common = sorted(mine.keys() & other.keys())
        mine, other = {line: mine[line] for line in common}, {line: other[line] for line in common}
    if not mine or not other:
        return None
    a, b = list(mine.values()), list(other.values())
    low, high = paired_interval(a, b) if paired else _unpaired_interval(a, b)
    value = float(np.mean(a) - np.mean(b))
    if ours.perplexity:
        value, low, high = math.exp(value), math.exp(low), math.exp(high)
    return Change(value, low, high, min(len(a), len(b)))


def check_same_examples(ours: Cell, theirs: Cell) -> None:
    """By the hashes, or by the references where a file of RULER's has none. Raises ValueError."""
    cell = f"cell {ours.task} {ours.length}"
    if ours.perplexity != theirs.perplexity:
        raise ValueError(f"{cell} has perplexities in one run and scores in another")
    if ours.hash is None or theirs.hash is None:
        for line in sorted(ours.predictions.keys() & theirs.predictions.keys()):
            if ours.predictions[line].outputs != theirs.predictions[line].outputs:
                raise ValueError(f"{cell} has other references in line {line}; compare with unpaired")
    elif ours.hash != theirs.hash:
        raise ValueError(f"{cell} has the hashes {theirs.hash} and {ours.hash}; expected the same, or unpaired")


def mean_score(cell: Cell) -> float | None:
    """Failed examples count 0."""
    scores = [one.score for one in cell.predictions.values() if one.score is not None]
    return float(np.mean(scores)) if scores and not cell.perplexity else None


def perplexity(cell: Cell) -> float | None:
    """Of all scored tokens, the first one included, which prefill predicts."""
    nll = [value for one in cell.predictions.values() for value in one.nll or ()]
    return math.exp(float(np.mean(nll))) if nll else None


def decode_ratio(ours: Run, theirs: Run, key: tuple[str, int]) -> float | None:
    """Their decode time over ours, above 1 if we are faster. None unless both were measured in gather mode, at one
    batch, on one kind and number of devices."""
    a, b = (run.cells[key].metrics for run in (ours, theirs))
    if any(run.config.mode != "gather" for run in (ours, theirs)) or ours.device != theirs.device:
        return None
    if a is None or b is None or a.batch != b.batch or not a.decode_ms_per_step or not b.decode_ms_per_step:
        return None
    return b.decode_ms_per_step / a.decode_ms_per_step


def mean_stride(cell: Cell) -> float | None:
    """Over the layers that refresh."""
    strides = [one for one in (cell.metrics.effective_stride if cell.metrics else ()) if one is not None]
    return float(np.mean(strides)) if strides else None


def shown_bytes(count: float) -> str:
    """Three digits, decimal units."""
    place = max(0, min(4, int(math.log10(count) // 3))) if count >= 1 else 0
    return f"{count / 1000**place:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[place]}"


def signed(value: float, digits: int = 1) -> str:
    """With a sign, but for a zero."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Padded, so that it reads as text too; the first column to the left, the others to the right."""
    cells = [[one.replace("|", "\\|") for one in line] for line in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = row
        padded = [first.ljust(widths[0]), *(one.rjust(width) for one, width in zip(others, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'-' * (widths[0] + 2)}|{''.join('-' * (width + 1) + ':|' for width in widths[1:])}"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def _values(cell: Cell) -> dict[int, float]:
    """By line what is averaged: scores, or the mean nats of a document, all of which have as many tokens."""
    if not cell.perplexity:
        return {line: one.score for line, one in cell.predictions.items() if one.score is not None}
    scored = {line: one.nll for line, one in cell.predictions.items() if one.nll}
    if len({len(nll) for nll in scored.values()}) > 1:
        raise ValueError(f"cell {cell.task} {cell.length} has documents of different numbers of scored tokens")
    return {line: float(np.mean(nll)) for line, nll in scored.items()}


def _unpaired_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """As a paired one, with both resampled on their own."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, size=(10_000, len(values))).mean(axis=1) for values in (ours, theirs)]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return float(low), float(high)


def _row(runs: Sequence[Run], task: str, length: int, *, paired: bool) -> dict[str, Any]:
    key = (task, length)
    note = RULER_STYLE if task.startswith("rs_") else ""
    columns = [_column(run, runs[0], key, paired) if key in run.cells else None for run in runs]
    return {"task": task, "length": length, "note": note, "runs": columns}


def _column(run: Run, first: Run, key: tuple[str, int], paired: bool) -> dict[str, Any]:
    cell = run.cells[key]
    beside = first.cells.get(key) if run is not first else None
    found = change(cell, beside, paired=paired) if beside else None
    of_ppl = cell.perplexity
    return {
        "score": mean_score(cell),
        "ppl": perplexity(cell),
        "difference": found.value if found and not of_ppl else None,
        "ppl_ratio": found.value if found and of_ppl else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "n": len(_values(cell)),
        "n_common": found.n if found else None,
        "decode_ratio": decode_ratio(run, first, key) if beside else None,
        "kv_bytes_per_step": cell.metrics.kv_bytes_per_step if cell.metrics else None,
        "effective_stride": mean_stride(cell),
    }


def _as_json(names: Sequence[str], rows: Sequence[dict[str, Any]], unpaired: bool) -> str:
    named = [row | {"runs": dict(zip(names, row["runs"], strict=True))} for row in rows]
    document = {"heading": _heading(names, unpaired), "paired": not unpaired, "first": names[0], "rows": named}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _as_csv(names: Sequence[str], rows: Sequence[dict[str, Any]], unpaired: bool) -> str:
    """A line per task and length; each run's columns begin with its name."""
    told = {"difference": "difference (unpaired)", "ppl_ratio": "ppl_ratio (unpaired)"} if unpaired else {}
    fields = list(next(column for row in rows for column in row["runs"] if column)) if rows else []
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["task", "length", "note", *(f"{name}: {told.get(f, f)}" for name in names for f in fields)])
    for row in rows:
        values = [(column or {}).get(f) for column in row["runs"] for f in fields]
        writer.writerow([row["task"], row["length"], row["note"], *("" if v is None else v for v in values)])
    return file.getvalue()


def _as_markdown(names: Sequence[str], rows: Sequence[dict[str, Any]], unpaired: bool) -> str:
    parts = [f"# {_heading(names, unpaired)}"]
    groups = {
        "Tasks": [row for row in rows if not row["note"] and not _of_perplexity(row)],
        f"Tasks, {RULER_STYLE}": [row for row in rows if row["note"]],
        "Perplexity": [row for row in rows if not row["note"] and _of_perplexity(row)],
    }
    for title, group in groups.items():
        if group:
            what = "perplexity (ratio" if title == "Perplexity" else "score (difference"
            parts.append(
                f"## {title}\n\n{_table(names, group, f'{what} [95 % interval], examples compared)', _quality)}"
            )
            parts.append(_table(names, group, "decode time ratio, KV bytes per step and row, effective stride", _cost))
    parts.append(
        "A ratio of decode times above 1 is faster than the first run; there is none where device, batch or mode "
        "differ. The stride is the mean of the layers that refresh."
    )
    return "\n\n".join(parts) + "\n"


def _heading(names: Sequence[str], unpaired: bool) -> str:
    how = "UNPAIRED: the runs may have answered different examples" if unpaired else "paired by example"
    return f"Runs compared with {names[0]}, {how}"


def _of_perplexity(row: dict[str, Any]) -> bool:
    return any(column and column["ppl"] is not None for column in row["runs"])


def _table(
    names: Sequence[str], rows: Sequence[dict[str, Any]], what: str, shown: Callable[[dict[str, Any]], str]
) -> str:
    body = [
        [f"{row['task']} {row['length']}", *("–" if column is None else shown(column) for column in row["runs"])]
        for row in rows
    ]
    return f"{what[0].upper()}{what[1:]}:\n\n{markdown_table(['task, length', *names], body)}"


def _quality(column: dict[str, Any]) -> str:
    value = column["ppl"] if column["ppl"] is not None else column["score"]
    if value is None:
        return "–"
    text = f"{value:.3f}" if column["ppl"] is not None else f"{value:.1f}"
    if column["ppl_ratio"] is not None:
        return (
            f"{text} (×{column['ppl_ratio']:.3f} [{column['low']:.3f}, {column['high']:.3f}], n {column['n_common']})"
        )
    if column["difference"] is not None:
        both = f"[{signed(column['low'])}, {signed(column['high'])}]"
        return f"{text} ({signed(column['difference'])} {both}, n {column['n_common']})"
    return f"{text} (n {column['n']})"


def _cost(column: dict[str, Any]) -> str:
    ratio, count, stride = column["decode_ratio"], column["kv_bytes_per_step"], column["effective_stride"]
    return ", ".join(
        [
            "–" if ratio is None else f"{ratio:.2f}×",
            "–" if count is None else shown_bytes(count),
            "–" if stride is None else f"stride {stride:.1f}",
        ]
    )


_FORMS: dict[str, Callable[[Sequence[str], Sequence[dict[str, Any]], bool], str]] = {
    "md": _as_markdown,
    "csv": _as_csv,
    "json": _as_json,
}
