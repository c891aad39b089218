"""Runs side by side: every task and length, each run beside the first one, paired by example."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from eval.finished.means import by_line, mean, mean_score, perplexity
from eval.finished.names import labels
from eval.finished.paired import change, decode_ratio
from eval.finished.read import read_run
from eval.finished.run import Run
from eval.finished.text import NONE, RULER_STYLE, markdown_table, ruler_style, shown, shown_bytes, signed


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


def _row(runs: Sequence[Run], task: str, length: int, *, paired: bool) -> dict[str, Any]:
    key = (task, length)
    note = RULER_STYLE if ruler_style(task) else ""
    columns = [_column(run, runs[0], key, paired) if key in run.cells else None for run in runs]
    return {"task": task, "length": length, "note": note, "runs": columns}


def _column(run: Run, first: Run, key: tuple[str, int], paired: bool) -> dict[str, Any]:
    cell = run.cells[key]
    beside = first.cells.get(key) if run is not first else None
    found = change(cell, beside, paired=paired) if beside else None
    of_ppl = cell.of_perplexity
    return {
        "score": mean_score(cell),
        "ppl": perplexity(cell),
        "difference": found.value if found and not of_ppl else None,
        "ppl_ratio": found.value if found and of_ppl else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "n": len(by_line(cell)),
        "n_common": found.n if found else None,
        "decode_ratio": decode_ratio(run, first, key) if beside else None,
        "kv_bytes_per_step": cell.metrics.kv_bytes_per_step if cell.metrics else None,
        "effective_stride": mean(cell.effective_stride),
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
    names: Sequence[str], rows: Sequence[dict[str, Any]], what: str, told: Callable[[dict[str, Any]], str]
) -> str:
    body = [
        [f"{row['task']} {row['length']}", *(NONE if column is None else told(column) for column in row["runs"])]
        for row in rows
    ]
    return f"{what[0].upper()}{what[1:]}:\n\n{markdown_table(['task, length', *names], body)}"


def _quality(column: dict[str, Any]) -> str:
    value = column["ppl"] if column["ppl"] is not None else column["score"]
    if value is None:
        return NONE
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
    stride = column["effective_stride"]
    times = shown(column["decode_ratio"], ".2f", "×")
    return f"{times}, {shown_bytes(column['kv_bytes_per_step'])}, {NONE if stride is None else f'stride {stride:.1f}'}"


_FORMS: dict[str, Callable[[Sequence[str], Sequence[dict[str, Any]], bool], str]] = {
    "md": _as_markdown,
    "csv": _as_csv,
    "json": _as_json,
}
