"""Folders of runs: what an evaluation writes, so that nothing answered is lost or mixed.

While a cell is under way every process appends whole batches of answers to a journal of its own, flushed to the disk.
When all lines are there, the journals become `predictions.jsonl` and `telemetry.jsonl`, sorted by line, and
`timing.json`: the first two are the same however often the run was interrupted and by how many processes it was made.
"""

import json
import os
import shutil
import traceback
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.lock import held

Record = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One line of a cell: RULER's record, what the layers did, and the seconds of its batch (None: not told, as for a
    batch that compiled)."""

    prediction: Record
    telemetry: Record | None
    seconds: Record | None

    @property
    def line(self) -> int:
        return self.prediction["others"]["line"]

    @property
    def failed(self) -> bool:
        return "error" in self.prediction["others"]


class CellFolder:
    """The answers to one cell. Raises ValueError when those that are there are to another task's questions."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, process: int = 0, processes: int = 1) -> None:
        self.path, self._identity = path, dict(identity)
        self._journal = path / "journal" / f"{process:05d}-of-{processes:05d}.jsonl"
        if (path / "task.json").exists():
            refuse_others(path / "task.json", self._identity, "out")

    def answers(self) -> dict[int, Answer]:
        """By line. One that failed gives way to one that did not; two that differ are an error (ValueError)."""
        found: dict[int, Answer] = {}
        for answer in self._stored():
            before = found.get(answer.line)
            if before is None or before.failed:
                found[answer.line] = answer
            elif not answer.failed and before.prediction != answer.prediction:
                raise ValueError(f"{self.path} has two answers to line {answer.line}, expected one; use --fresh true")
        return dict(sorted(found.items()))

    def append(self, answers: Sequence[Answer]) -> None:
        """Adds a batch; when it returns, all of it is on the disk."""
        self._begin()
        self._journal.parent.mkdir(exist_ok=True)
        with self._journal.open("ab") as file:
            _cut_torn_line(self._journal)  # "ab" writes at the end, wherever that is by now
            for answer in answers:
                file.write(_line(vars(answer)))
            file.flush()
            os.fsync(file.fileno())

    def fail(self, error: Exception) -> None:
        """Says why answers are missing, in `error.json`."""
        self._begin()
        told = {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}
        write_json(self.path / "error.json", told)

    def _begin(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "task.json").exists():
            write_json(self.path / "task.json", self._identity)

    def merge(self) -> None:
        """Makes the files of a cell from its journals, and removes these."""
        answers = self.answers().values()
        seconds = [answer.seconds for answer in answers if answer.seconds is not None]
        _write(self.path / "telemetry.jsonl", (_line(a.telemetry) for a in answers if a.telemetry is not None))
        _write(self.path / "timing.jsonl", map(_line, seconds))
        _write(self.path / "predictions.jsonl", (_line(answer.prediction) for answer in answers))
        shutil.rmtree(self.path / "journal", ignore_errors=True)
        (self.path / "error.json").unlink(missing_ok=True)

    def _stored(self) -> Iterable[Answer]:
        telemetry = {record["line"]: record for record in _records(self.path / "telemetry.jsonl")}
        seconds = {record["line"]: record for record in _records(self.path / "timing.jsonl")}
        for prediction in _records(self.path / "predictions.jsonl"):
            line = prediction["others"]["line"]
            yield Answer(prediction, telemetry.get(line), seconds.get(line))
        for journal in sorted((self.path / "journal").glob("*.jsonl")):
            for record in _records(journal):
                yield Answer(**record)


class RunFolder:
    """The folder of one policy. Raises ValueError when what is there was made with other settings."""

    def __init__(self, out: Path, name: str, config: Mapping[str, Any], hash: str, *, fresh: bool) -> None:
        self.config = {**config, "hash": hash}
        path = out / f"{name}__{hash}"
        number = 1
        while fresh and path.exists():
            number += 1
            path = out / f"{name}__{hash}-{number}"
        self.path = path
        if (path / "config.json").exists():
            refuse_others(path / "config.json", self.config, "out")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other runs out while inside (ValueError if one is there); writes what this run is of, once, and removes
        the beginnings of files that a killed one left."""
        self.path.mkdir(parents=True, exist_ok=True)
        with held(self.path / ".lock"):
            for beginning in self.path.rglob(f".*.{'[0-9a-f]' * 32}"):
                beginning.unlink()
            if not (self.path / "config.json").exists():
                write_json(self.path / "config.json", self.config)
            yield

    def add_invocation(self, told: Mapping[str, Any]) -> None:
        """One more entry of `run_meta.json`."""
        path = self.path / "run_meta.json"
        before = json.loads(path.read_text()) if path.exists() else []
        write_json(path, [*before, told])

    def cell(self, task: str, length: int) -> Path:
        return self.path / "cells" / task / str(length)


def refuse_others(path: Path, expected: Mapping[str, Any], argument: str) -> None:
    """Raises ValueError when a JSON file holds something else, naming each field that differs with both values."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{argument}: {path} is not valid JSON; use --fresh true") from error
    expected = json.loads(json.dumps(expected))
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if names:
        differences = "; ".join(f"{name}={found.get(name)!r}, this run has {expected.get(name)!r}" for name in names)
        raise ValueError(
            f"{argument}: {path.parent} was made with {differences}; name another folder, or use --fresh true"
        )


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Likewise."""
    _write(path, [text.encode()])


def _write(path: Path, parts: Iterable[bytes]) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # on a shared disk, many processes write it
    with partial.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass") + b"\n"


def _records(path: Path) -> list[Record]:
    """The whole lines of a file; one that a killed run did not finish is left out."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line.decode("utf-8", "surrogatepass")))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON; remove the line, or use --fresh true") from error
    return records


def _cut_torn_line(path: Path) -> None:
    """The end of a journal that a killed run did not finish."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
