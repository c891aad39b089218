"""From the answers to a cell to its figures, and from runs to tables beside their dense one."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.cells import Cell
from eval.metrics import LEAST_CEILING, clean, interval, paired_interval
from eval.perplexity import perplexity
from eval.ruler_files import TaskScore
from eval.store import Answer

UNDERFILLED = 0.9  # of the asked length


def cell_metrics(cell: Cell, answers: Sequence[Answer], weight_bytes: int) -> dict[str, Any]:
    """The figures of a cell, scores from 0 to 100; None where there is nothing to tell."""
    others = [answer.prediction["others"] for answer in answers]
    good = [o for o in others if "error" not in o]
    layers = [a.telemetry["layers"] for a in answers if a.telemetry is not None and not a.failed]
    figures = {
        "task": cell.task,
        "length": cell.length,
        "metric": cell.metric,
        "hash": cell.hash,
        "n": len(others),
        "failed": len(others) - len(good),
        "underfilled": sum(_underfilled(o, cell.length) for o in good),
        "empty": sum(not clean(a.prediction["pred"]) for a in answers) if cell.metric else 0,
        "score": None,
        "interval": None,
        "prompt_tokens": _mean(o["prompt_tokens"] for o in good),
        "gen_tokens": _mean(o["gen_tokens"] for o in good),
        "limit_share": _mean(o["stop"] == "limit" for o in good),
        "policy_steps": _mean(o["policy_steps"] for o in good),
        "effective_stride": _strides(layers, good),
        "overlap": _by_layer(layers, "overlap"),
        "coverage": _by_layer(layers, "coverage_by_age"),
        "density": _mean(o["density"] for o in good),
        "kv_bytes_per_step": _mean(o["kv_bytes_per_step"] for o in good),
        "dense_kv_bytes_per_step": _mean(o["dense_kv_bytes_per_step"] for o in good),
        "weight_bytes": weight_bytes,
    }
    if cell.metric is None:
        nll = [o["nll"] for o in good]
        if nll:
            figures |= {"ppl": perplexity(nll), "ppl_policy": perplexity(nll, first=1), "tokens": sum(map(len, nll))}
        return figures
    scores = [o["score"] for o in others]
    figures |= {"score": float(np.mean(scores)), "interval": list(interval(scores)), "extras": _extras(others)}
    return figures


def timing(seconds: Sequence[Mapping[str, Any]], batch: int) -> dict[str, Any]:
    """Milliseconds of a batch's prefill and of one of its decode steps; None where every batch compiled."""
    return {
        "batch": batch,
        "batches": len(seconds),
        "prefill_ms": _mean(1e3 * s["prefill"] for s in seconds),
        "decode_ms_per_step": _mean(1e3 * s["decode"] / s["steps"] for s in seconds if s["steps"]),
    }


def beside_dense(run: str, ours: Sequence[Answer], theirs: Sequence[Answer]) -> dict[str, Any] | None:
    """How a policy's answers stand to the dense ones of the folder `run`: over the lines that both have answered."""
    dense = {answer.line: answer.prediction for answer in theirs if not answer.failed}
    pairs = [(a.prediction, dense[a.line]) for a in ours if a.line in dense and not a.failed]
    if not pairs or "score" not in pairs[0][0]["others"]:
        return None
    own, full = (np.array([p[side]["others"]["score"] for p in pairs]) for side in (0, 1))
    score = float(full.mean())
    same = [p["pred"] == d["pred"] for p, d in pairs]
    enough = score >= LEAST_CEILING
    return {
        "run": run,
        "n": len(pairs),
        "score": score,
        "retention": 100 * float(own.mean()) / score if enough else None,
        **({} if enough else {"note": "ceiling too low"}),
        "difference": float((own - full).mean()),
        "interval": list(paired_interval(own.tolist(), full.tolist())),
        "agreement": float(np.mean(same)),
        "first_difference": _mean(_first_difference(p["pred"], d["pred"]) for p, d in pairs if p["pred"] != d["pred"]),
    }


def task_scores(cells: Iterable[Mapping[str, Any]]) -> dict[int, list[TaskScore]]:
    """Of each length the columns of RULER's summary, one for each task with a score."""
    columns: dict[int, list[TaskScore]] = {}
    for cell in cells:
        if cell["score"] is not None:
            score = TaskScore(cell["task"], cell["score"], cell["empty"], cell["n"])
            columns.setdefault(cell["length"], []).append(score)
    return columns


COLUMNS = (
    *(
        "model",
        "policy",
        "k",
        "task",
        "length",
        "n",
        "failed",
        "score",
        "low",
        "high",
        "ppl",
        "dense_score",
        "retention",
    ),
    *("density", "kv_bytes_per_step", "dense_kv_bytes_per_step", "policy_steps", "effective_stride", "gen_tokens"),
    *("limit_share", "agreement"),
)


def long_csv(model: str, policy: Mapping[str, Any], cells: Iterable[Mapping[str, Any]]) -> str:
    """One line per cell."""
    text = io.StringIO()
    lines = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    lines.writeheader()
    for cell in cells:
        low, high = cell["interval"] or (None, None)
        strides = [stride for stride in cell["effective_stride"] if stride is not None]
        dense = cell.get("dense") or {}
        own = {"model": model, "policy": policy["name"], "k": policy.get("k"), "low": low, "high": high}
        beside = {"dense_score": dense.get("score"), **{n: dense.get(n) for n in ("retention", "agreement")}}
        lines.writerow({**cell, **own, **beside, "effective_stride": _mean(strides)})
    return text.getvalue()


def _underfilled(others: Mapping[str, Any], length: int) -> bool:
    """The turns of a conversation but its last are shorter by nature."""
    if "turn" in others["meta"] and not others["meta"]["control"]:
        return False
    return others["prompt_tokens"] + others["gen_tokens"] < UNDERFILLED * length


def _strides(layers: Sequence[Sequence[Mapping]], good: Sequence[Mapping]) -> list[float | None]:
    """Of each layer: decode steps over refreshes, of all examples."""
    if not layers:
        return []
    steps = sum(o["gen_tokens"] - 1 for o in good)
    refreshes = [sum(len(of_row[layer]["refreshes"]) for of_row in layers) for layer in range(len(layers[0]))]
    return [steps / count if count else None for count in refreshes]


def _by_layer(layers: Sequence[Sequence[Mapping]], name: str) -> list[float | None]:
    if not layers:
        return []
    return [_mean(value for of_row in layers for value in of_row[layer][name] or ()) for layer in range(len(layers[0]))]


def _extras(others: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means of what else the metric told, and of the scores by turn."""
    extras = [o["extras"] for o in others if "extras" in o]
    names = list(dict.fromkeys(name for extra in extras for name in extra))
    means = {name: _mean(extra[name] for extra in extras if name in extra) for name in names}
    turns: dict[str, list[float]] = {}
    for o in others:
        if "turn" in o["meta"]:
            turn = "control" if o["meta"]["control"] else f"turn_{o['meta']['turn']}"
            turns.setdefault(turn, []).append(o["score"])
    return means | {turn: _mean(scores) for turn, scores in turns.items()}


def _first_difference(ours: str, theirs: str) -> int:
    """In characters."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None
