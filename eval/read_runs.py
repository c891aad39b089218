"""Reads run folders (EVALUATION.md, section 5) and folders of RULER's prediction files, and says which file and line is
malformed. Also names the runs that stand beside each other."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.metrics import METRICS, Metric

Numbers = tuple[float | None, ...]


@dataclass(frozen=True)
class Config:
    """What a prediction depends on. `values` is all of config.json."""

    hash: str
    model: Mapping[str, Any]
    policy: Mapping[str, Any]
    mode: str
    question: str
    values: Mapping[str, Any]

    @property
    def k(self) -> int | None:
        """The policy's budget, which may be its selector's."""
        return next((v for name, v in flat(self.policy).items() if name == "k" or name.endswith(".k")), None)

    @property
    def dense(self) -> bool:
        return self.policy["name"] == "full"


@dataclass(frozen=True)
class Prediction:
    """One example's answer. `score` (0 to 100) is 0 where the example failed, and None in a perplexity cell; `nll` has
    the nats of each scored token there."""

    line: int
    pred: str
    outputs: tuple[str, ...]
    score: float | None
    nll: tuple[float, ...] | None
    gen_tokens: int | None
    meta: Mapping[str, Any]
    error: str | None


@dataclass(frozen=True)
class Layer:
    """Of one example: `overlap` by refresh, `coverage_by_age` by steps since the refresh, from 0."""

    layer: int
    overlap: Numbers
    coverage_by_age: Numbers


@dataclass(frozen=True)
class CellMetrics:
    """Means over a cell; None where not measured. Times in ms of a batch, bytes of one row."""

    failed: int
    underfilled: int
    empty: int
    interval: tuple[float, float] | None
    limit_share: float | None
    policy_steps: float | None
    effective_stride: Numbers
    overlap: Numbers
    coverage: Numbers
    kv_bytes_per_step: float | None
    dense_kv_bytes_per_step: float | None
    weight_bytes: float | None
    prefill_ms: float | None
    decode_ms_per_step: float | None
    batch: int | None


@dataclass(frozen=True)
class Cell:
    """A task at a length. `hash` is None where the file does not tell it; predictions go by line."""

    task: str
    length: int
    hash: str | None
    predictions: Mapping[int, Prediction]
    telemetry: Mapping[int, tuple[Layer, ...]]
    metrics: CellMetrics | None
    error: str | None

    @property
    def perplexity(self) -> bool:
        return any(one.nll is not None for one in self.predictions.values())


@dataclass(frozen=True)
class Bench:
    """A line of bench.jsonl; times are 10th, 50th and 90th percentile in ms."""

    kind: str
    valid: bool
    status: str
    device: str
    policy: Mapping[str, Any]
    mode: str
    weights: str
    length: int
    batch: int
    decode: tuple[float, float, float] | None
    dense_decode: tuple[float, float, float] | None
    ratio_decode: float | None
    ratio_prefill: float | None
    floor_ms: float | None
    mbu: float | None
    ideal_speedup: float | None
    bytes_per_step: float | None
    effective_stride: Numbers


@dataclass(frozen=True)
class Run:
    path: Path
    config: Config
    invocations: tuple[Mapping[str, Any], ...]
    cells: Mapping[tuple[str, int], Cell]
    bench: tuple[Bench, ...]

    @property
    def device(self) -> str:
        """Of all invocations; more than one if they differ."""
        found = [_device(one["device"], "count") for one in self.invocations if one.get("device")]
        return " and ".join(dict.fromkeys(found)) or "unknown device"


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Run folders, and folders of benchmarks (`bench.jsonl` alone), whose records go to the run of their model and
    policy, or make one of their own. Raises as `read_run`."""
    of_benches = [path for path in paths if (path / "bench.jsonl").exists() and not (path / "config.json").exists()]
    runs = [read_run(path) for path in paths if path not in of_benches]
    for path in of_benches:
        for where, values in _lines(path / "bench.jsonl"):
            record, model = _bench(where, values), {"name": _take(values, "model", str, where)}
            places = (
                place
                for place, run in enumerate(runs)
                if run.config.policy == record.policy and run.config.model.get("name") == model["name"]
            )
            place = next(places, None)
            if place is None:
                config = Config("", model, record.policy, record.mode, "unknown", {})
                runs.append(Run(path, config, (), {}, (record,)))
            else:
                runs[place] = replace(runs[place], bench=(*runs[place].bench, record))
    return runs


def read_run(path: Path) -> Run:
    """A run folder, or a folder with `pred/*.jsonl` or `<length>/pred/*.jsonl`.

    Raises ValueError when it is neither, or a file is malformed, naming file and line.
    """
    if (path / "config.json").exists():
        return _read_folder(path)
    files = sorted([*path.glob("pred/*.jsonl"), *path.glob("*/pred/*.jsonl")])
    if path.name == "pred":
        files = sorted(path.glob("*.jsonl"))
    if not files:
        raise ValueError(f"run={str(path)!r} has neither config.json nor pred/*.jsonl")
    return _read_ruler(path, files)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    result = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


def families(runs: Sequence[Run]) -> list[str]:
    """A name for each run's policy without its budget: runs that differ in the budget alone share it. Knobs are told
    only where there are two of a name and a budget."""
    names = ["full (dense)" if run.config.dense else str(run.config.policy["name"]) for run in runs]
    result = []
    for run, name in zip(runs, names, strict=True):
        alike = [other for other, its in zip(runs, names, strict=True) if its == name]
        twice = max(Counter(other.config.k for other in alike).values()) > 1
        result.append(", ".join([name, *(_differing(run, alike) if twice else [])]))
    return result


def labels(runs: Sequence[Run]) -> list[str]:
    """A distinct name for each run: policy, budget, and what else it takes."""
    result = []
    for run, family in zip(runs, families(runs), strict=True):
        result.append(family if run.config.k is None else f"{family}, k {run.config.k}")
    if len({run.config.model.get("name") for run in runs}) > 1:
        result = [f"{run.config.model.get('name')}: {label}" for run, label in zip(runs, result, strict=True)]
    count = Counter(result)
    return [
        label if count[label] == 1 else f"{label} ({run.config.hash or run.path.name})"
        for run, label in zip(runs, result, strict=True)
    ]


def _differing(run: Run, alike: Sequence[Run]) -> list[str]:
    told = [
        flat(other.config.policy) | {"mode": other.config.mode, "question": other.config.question} for other in alike
    ]
    own = flat(run.config.policy) | {"mode": run.config.mode, "question": run.config.question}
    names = [name for name in own if name.split(".")[-1] != "k" and len({str(t.get(name)) for t in told}) > 1]
    return [f"{name} {own[name]}" for name in names]


def _read_folder(path: Path) -> Run:
    where = str(path / "config.json")
    values = _object(path / "config.json")
    policy = _take(values, "policy", dict, where)
    _take(policy, "name", str, f"{where}, policy")
    config = Config(
        _take(values, "hash", str, where),
        _take(values, "model", dict, where),
        policy,
        _take(values, "mode", str, where),
        _take(values, "question", str, where),
        values,
    )
    cells = [_read_cell(folder) for folder in sorted(path.glob("cells/*/*")) if folder.is_dir()]
    ordered = sorted(cells, key=lambda cell: (cell.task, cell.length))
    bench = path / "bench.jsonl"
    return Run(
        path,
        config,
        _invocations(path / "run_meta.json"),
        {(cell.task, cell.length): cell for cell in ordered},
        tuple(_bench(*line) for line in _lines(bench)) if bench.exists() else (),
    )


def _read_ruler(path: Path, files: Sequence[Path]) -> Run:
    cells = {}
    for file in files:
        predictions = _predictions(file, METRICS["part" if file.stem.startswith("qa") else "all"])
        above = file.parent.parent.resolve().name
        if not above.isdecimal():
            raise ValueError(f"run={str(path)!r}: {file} stands in {above!r}; expected pred/ in a folder of a length")
        cells[file.stem, int(above)] = Cell(file.stem, int(above), None, predictions, {}, None, None)
    whole = [part for part in path.resolve().parts if part != "pred" and not part.isdecimal()]
    config = Config("", {"name": whole[-2]}, {"name": whole[-1]}, "unknown", "unknown", {})
    return Run(path, config, (), cells, ())


def _read_cell(folder: Path) -> Cell:
    where = str(folder / "task.json")
    task = _object(folder / "task.json")
    names = ("predictions.jsonl", "telemetry.jsonl", "metrics.json", "timing.json", "error.json")
    there = {name: folder / name for name in names if (folder / name).exists()}
    timing = _object(there["timing.json"]) if "timing.json" in there else {}
    telemetry = _lines(there["telemetry.jsonl"]) if "telemetry.jsonl" in there else []
    return Cell(
        _take(task, "name", str, where),
        _take(task, "length", int, where),
        _take(task, "hash", str, where),
        _predictions(there["predictions.jsonl"]) if "predictions.jsonl" in there else {},
        {_take(line, "line", int, at): _layers(at, line) for at, line in telemetry},
        _metrics(there["metrics.json"], timing) if "metrics.json" in there else None,
        str(_object(there["error.json"]).get("error")) if "error.json" in there else None,
    )


def _predictions(path: Path, metric: Metric | None = None) -> dict[int, Prediction]:
    """By line. `metric` scores records that bring no score of their own. A failed one gives way to its repetition."""
    found: dict[int, Prediction] = {}
    for place, (where, record) in enumerate(_lines(path)):
        one = _prediction(where, record, place, metric)
        before = found.get(one.line)
        if before is not None and before.error is None:
            raise ValueError(f"{where}: line={one.line} was answered before")
        found[one.line] = one
    return dict(sorted(found.items()))


def _prediction(where: str, record: Mapping[str, Any], place: int, metric: Metric | None) -> Prediction:
    others = _take(record, "others", dict, where) if metric is None else record.get("others") or {}
    pred = _take(record, "pred", str, where)
    outputs = tuple(_take(record, "outputs" if "outputs" in record else "output", list, where))
    error = others.get("error")
    nll = None if others.get("nll") is None else tuple(one for one in _many(others, "nll", where) if one is not None)
    score = _number(others, "score", where)
    if error is not None:
        score, nll = 0.0, None
    elif score is None and nll is None:
        if metric is None:
            raise ValueError(f"{where}: others has neither score, nll nor error")
        score = metric(pred, outputs, {})["score"]
    if nll is not None and len(nll) != len(others["nll"]):
        raise ValueError(f"{where}: nll has a null; expected a number for each token")
    return Prediction(
        _take(others, "line", int, where) if metric is None or "line" in others else place,
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
        Layer(_take(layer, "layer", int, where), _many(layer, "overlap", where), _many(layer, "coverage_by_age", where))
        for layer in _take(line, "layers", list, where)
    )


def _metrics(path: Path, timing: Mapping[str, Any]) -> CellMetrics:
    values, where = {**_object(path), **timing}, str(path)
    low_high = _many(values, "interval", where)
    low, high = low_high if len(low_high) == 2 else (None, None)
    batch = _number(values, "batch", where)
    return CellMetrics(
        failed=int(_number(values, "failed", where) or 0),
        underfilled=int(_number(values, "underfilled", where) or 0),
        empty=int(_number(values, "empty", where) or 0),
        interval=None if low is None or high is None else (low, high),
        limit_share=_number(values, "limit_share", where),
        policy_steps=_number(values, "policy_steps", where),
        effective_stride=_many(values, "effective_stride", where),
        overlap=_many(values, "overlap", where),
        coverage=_many(values, "coverage", where),
        kv_bytes_per_step=_number(values, "kv_bytes_per_step", where),
        dense_kv_bytes_per_step=_number(values, "dense_kv_bytes_per_step", where),
        weight_bytes=_number(values, "weight_bytes", where),
        prefill_ms=_number(values, "prefill_ms", where),
        decode_ms_per_step=_number(values, "decode_ms_per_step", where),
        batch=None if batch is None else int(batch),
    )


def _bench(where: str, values: Mapping[str, Any]) -> Bench:
    device = _take(values, "device", dict, where)
    policy = _take(values, "policy", dict, where)
    _take(policy, "name", str, f"{where}, policy")
    dense = values.get("dense") or {}
    moved = [v for v in (values.get("bytes_per_step") or {}).values() if v is not None]
    return Bench(
        kind=_take(values, "kind", str, where),
        valid=bool(values.get("valid")),
        status=_take(values, "status", str, where),
        device=_device(device, "chips"),
        policy=policy,
        mode=str(values.get("mode")),
        weights=str(values.get("weights")),
        length=_take(values, "length", int, where),
        batch=_take(values, "batch", int, where),
        decode=_percentiles(values, where),
        dense_decode=_percentiles(dense, where),
        **{n: _number(values, n, where) for n in ("ratio_decode", "ratio_prefill", "floor_ms", "mbu", "ideal_speedup")},
        bytes_per_step=sum(moved) if moved else None,
        effective_stride=_many(values, "effective_stride", where),
    )


def _percentiles(values: Mapping[str, Any], where: str) -> tuple[float, float, float] | None:
    times = values.get("decode_ms_per_step")
    if times is None:
        return None
    return _there(times, "p10", where), _there(times, "p50", where), _there(times, "p90", where)


def _device(device: Mapping[str, Any], count: str) -> str:
    return f"{device.get('kind', 'unknown')} × {device.get(count, '?')}"


def _invocations(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.exists():
        return ()
    entries = _parse(path.read_text(encoding="utf-8"), path)
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise ValueError(f"{path}: expected a list of objects")
    return tuple(entries)


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} is missing")
    value = _parse(path.read_text(encoding="utf-8"), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object")
    return value


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place, as errors tell it, and its object."""
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if text.strip():
            where = f"{path}, line {number}"
            value = _parse(text, path, number)
            if not isinstance(value, dict):
                raise ValueError(f"{where}: expected an object")
            yield where, value


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    """`line` is the text's place in the file, of which it is all if it has none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line or error.lineno}: {error.msg}") from error


def _take[T](values: Mapping[str, Any], name: str, kind: type[T], where: str) -> T:
    value = values.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {name}={value!r}; expected {kind.__name__}")
    return value


def _there(values: Any, key: Any, where: str) -> float:
    """A number that must be there."""
    try:
        value = values[key]
    except (LookupError, TypeError):
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {key}={value!r}; expected a finite number")
    return float(value)


def _number(values: Mapping[str, Any], name: str, where: str) -> float | None:
    return None if values.get(name) is None else _there(values, name, where)


def _many(values: Mapping[str, Any], name: str, where: str) -> Numbers:
    """A list of numbers and nulls; nothing if it is not there."""
    found = values.get(name)
    if found is None:
        return ()
    if not isinstance(found, list):
        raise ValueError(f"{where}: {name}={found!r}; expected a list")
    return tuple(None if one is None else _there({name: one}, name, where) for one in found)
