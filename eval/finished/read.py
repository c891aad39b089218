"""Reads run folders (docs/evaluation.md) and folders of RULER's prediction files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.finished.bench_lines import bench_record
from eval.finished.cell_files import read_cell, read_predictions
from eval.finished.checked_json import parse, read_lines, read_object, take
from eval.finished.run import Cell, Config, Run
from eval.metrics import METRICS


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Run folders, and folders of benchmarks (`bench.jsonl` alone), whose records go to the run of their model and
    policy, or make one of their own. Raises as `read_run`."""
    of_benches = [path for path in paths if (path / "bench.jsonl").exists() and not (path / "config.json").exists()]
    runs = [read_run(path) for path in paths if path not in of_benches]
    for path in of_benches:
        for where, values in read_lines(path / "bench.jsonl"):
            record, model = bench_record(where, values), {"name": take(values, "model", str, where)}
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


def _read_folder(path: Path) -> Run:
    where = str(path / "config.json")
    values = read_object(path / "config.json")
    policy = take(values, "policy", dict, where)
    take(policy, "name", str, f"{where}, policy")
    config = Config(
        take(values, "hash", str, where),
        take(values, "model", dict, where),
        policy,
        take(values, "mode", str, where),
        take(values, "question", str, where),
        values,
    )
    cells = [read_cell(folder) for folder in sorted(path.glob("cells/*/*")) if folder.is_dir()]
    ordered = sorted(cells, key=lambda cell: (cell.task, cell.length))
    bench = path / "bench.jsonl"
    return Run(
        path,
        config,
        _invocations(path / "run_meta.json"),
        {(cell.task, cell.length): cell for cell in ordered},
        tuple(bench_record(*line) for line in read_lines(bench)) if bench.exists() else (),
    )


def _read_ruler(path: Path, files: Sequence[Path]) -> Run:
    cells = {}
    for file in files:
        predictions = read_predictions(file, METRICS["part" if file.stem.startswith("qa") else "all"])
        above = file.parent.parent.resolve().name
        if not above.isdecimal():
            raise ValueError(f"run={str(path)!r}: {file} stands in {above!r}; expected pred/ in a folder of a length")
        cells[file.stem, int(above)] = Cell(file.stem, int(above), None, predictions, {}, None, None)
    whole = [part for part in path.resolve().parts if part != "pred" and not part.isdecimal()]
    config = Config("", {"name": whole[-2]}, {"name": whole[-1]}, "unknown", "unknown", {})
    return Run(path, config, (), cells, ())


def _invocations(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.exists():
        return ()
    entries = parse(path.read_text(encoding="utf-8"), path)
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise ValueError(f"{path}: expected a list of objects")
    return tuple(entries)
