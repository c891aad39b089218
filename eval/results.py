"""From the answers of runs to the files that others read."""

import json
import sys
from collections.abc import Sequence

from eval.cells import Cell
from eval.ruler_files import summary_csv
from eval.store import Answer, CellFolder, RunFolder, write_json, write_text
from eval.summary import beside_dense, cell_metrics, long_csv, task_scores, timing
from eval.work import Run


def write_results(cells: Sequence[Cell], runs: Sequence[Run], dense: Run | None, weight_bytes: int, batch: int) -> bool:
    """Writes every run's files, and says whether all is there. `dense` need not be one of the runs."""
    complete = True
    for cell in cells:
        theirs = _dense_answers(dense, cell)
        for run in runs:
            folder = run.cell(cell)
            own = folder.answers()
            missing = len(set(range(cell.examples)) - own.keys())
            failed = sum(answer.failed for answer in own.values())
            if missing or failed:
                complete = False
                _complain(folder, cell, missing, failed)
            if missing:
                continue
            folder.merge()
            answers = list(own.values())
            metrics = cell_metrics(cell, answers, weight_bytes)
            metrics["dense"] = None if dense is None else beside_dense(dense.folder.path.name, answers, theirs)
            write_json(folder.path / "metrics.json", metrics)
            write_json(folder.path / "timing.json", timing([a.seconds for a in answers if a.seconds], batch))
    for run in runs:
        _write_run(run.folder)
    return complete


def _dense_answers(dense: Run | None, cell: Cell) -> list[Answer]:
    if dense is None:
        return []
    try:
        folder = dense.cell(cell)
    except ValueError:  # it was asked other questions
        return []
    return list(folder.answers().values())


def _complain(folder: CellFolder, cell: Cell, missing: int, failed: int) -> None:
    why = folder.path / ("error.json" if missing else "predictions.jsonl")
    counts = f"lacks {missing} of {cell.examples} answers, {failed} failed"
    print(f"eval: {folder.path} {counts}; see {why}", file=sys.stderr)


def _write_run(folder: RunFolder) -> None:
    """The figures of all its cells, those of earlier invocations too."""
    config, path = folder.config, folder.path
    policy, model = config["policy"], config["model"]["name"]
    figures = [json.loads(found.read_text()) for found in sorted(path.glob("cells/*/*/metrics.json"))]
    figures.sort(key=lambda cell: (cell["task"], cell["length"]))
    write_json(path / "metrics.json", {"hash": config["hash"], "policy": policy, "model": model, "cells": figures})
    for length, columns in task_scores(figures).items():
        write_text(path / f"summary-{length}.csv", summary_csv(columns))
    write_text(path / "summary_long.csv", long_csv(model, policy, figures))
