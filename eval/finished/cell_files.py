"""The files of a cell: its predictions, what was measured on the way, and their means."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.finished.checked_json import number, numbers, read_lines, read_object, take
from eval.finished.run import Cell, CellMetrics, Layer, Prediction
from eval.metrics import Metric


def read_cell(folder: Path) -> Cell:
    """`task.json` must be there; of the others, what a run has written so far."""
    where = str(folder / "task.json")
    task = read_object(folder / "task.json")
    names = ("predictions.jsonl", "telemetry.jsonl", "metrics.json", "timing.json", "error.json")
    there = {name: folder / name for name in names if (folder / name).exists()}
    timing = read_object(there["timing.json"]) if "timing.json" in there else {}
    telemetry = read_lines(there["telemetry.jsonl"]) if "telemetry.jsonl" in there else []
    return Cell(
        take(task, "name", str, where),
        take(task, "length", int, where),
        take(task, "hash", str, where),
        read_predictions(there["predictions.jsonl"]) if "predictions.jsonl" in there else {},
        {take(line, "line", int, at): _layers(at, line) for at, line in telemetry},
        _metrics(there["metrics.json"], timing) if "metrics.json" in there else None,
        str(read_object(there["error.json"]).get("error")) if "error.json" in there else None,
    )


def read_predictions(path: Path, metric: Metric | None = None) -> dict[int, Prediction]:
    """By line. `metric` scores records that bring no score of their own. A failed one gives way to its repetition."""
    found: dict[int, Prediction] = {}
    for place, (where, record) in enumerate(read_lines(path)):
        one = _prediction(where, record, place, metric)
        before = found.get(one.line)
        if before is not None and before.error is None:
            raise ValueError(f"{where}: line={one.line} was answered before")
        found[one.line] = one
    return dict(sorted(found.items()))


def _prediction(where: str, record: Mapping[str, Any], place: int, metric: Metric | None) -> Prediction:
    others = take(record, "others", dict, where) if metric is None else record.get("others") or {}
    pred = take(record, "pred", str, where)
    outputs = tuple(take(record, "outputs" if "outputs" in record else "output", list, where))
    error = others.get("error")
    nll = None if others.get("nll") is None else tuple(one for one in numbers(others, "nll", where) if one is not None)
    score = number(others, "score", where)
    if error is not None:
        score, nll = 0.0, None
    elif score is None and nll is None:
        if metric is None:
            raise ValueError(f"{where}: others has neither score, nll nor error")
        score = metric(pred, outputs, {})["score"]
    if nll is not None and len(nll) != len(others["nll"]):
        raise ValueError(f"{where}: nll has a null; expected a number for each token")
    return Prediction(
        take(others, "line", int, where) if metric is None or "line" in others else place,
        pred,
        outputs,
        None if nll is not None else score,
        nll,
        others.get("gen_tokens"),
        others.get("meta") or {},
        error,
    )


def _layers(where: str, line: Mapping[str, Any]) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            take(layer, "layer", int, where), numbers(layer, "overlap", where), numbers(layer, "coverage_by_age", where)
        )
        for layer in take(line, "layers", list, where)
    )


def _metrics(path: Path, timing: Mapping[str, Any]) -> CellMetrics:
    values, where = {**read_object(path), **timing}, str(path)
    low_high = numbers(values, "interval", where)
    low, high = low_high if len(low_high) == 2 else (None, None)
    batch = number(values, "batch", where)
    return CellMetrics(
        failed=int(number(values, "failed", where) or 0),
        underfilled=int(number(values, "underfilled", where) or 0),
        empty=int(number(values, "empty", where) or 0),
        interval=None if low is None or high is None else (low, high),
        limit_share=number(values, "limit_share", where),
        policy_steps=number(values, "policy_steps", where),
        effective_stride=numbers(values, "effective_stride", where),
        overlap=numbers(values, "overlap", where),
        coverage=numbers(values, "coverage", where),
        kv_bytes_per_step=number(values, "kv_bytes_per_step", where),
        dense_kv_bytes_per_step=number(values, "dense_kv_bytes_per_step", where),
        weight_bytes=number(values, "weight_bytes", where),
        prefill_ms=number(values, "prefill_ms", where),
        decode_ms_per_step=number(values, "decode_ms_per_step", where),
        batch=None if batch is None else int(batch),
    )
