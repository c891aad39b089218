"""An evaluation that is killed, anywhere and often, leaves what one leaves that was not."""

import io
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from eval.cells import Cell
from eval.config import chosen
from eval.lock import held
from eval.prompts import Prompts
from eval.results import write_results
from eval.store import Answer, RunFolder
from eval.together import batches
from eval.work import Run
from tests.recycled_jax.tiny import save_tiny

ROOT = Path(__file__).parents[2]
NAMES = ("predictions.jsonl", "telemetry.jsonl", "metrics.json", "task.json", "config.json", "*.csv")
OPEN = io.open
Moment = Callable[[], bool]  # whether it has come


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """Without `out`: two policies on two tasks, in twelve batches."""
    model = save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=1)
    tasks = ["--tasks", "[single, {name: perplexity, scored: 8}]", "--preset", "small", "--analysis", "1"]
    sizes = ["--lengths", "[512]", "--examples", "6", "--batch", "2", "--policies", "[full, {name: streaming, k: 16}]"]
    return [sys.executable, "-m", "eval", "--model", str(model), *sizes, *tasks]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, str]:
    """The environment in which what one run has compiled is there for the next."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs"))}
    least = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return {**os.environ, **cache, **least}


@pytest.fixture(scope="module")
def expected(command, programs, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    finish(start(command, programs, out))
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for name in NAMES for path in out.rglob(name)}


def start(command: Sequence[str], programs: dict[str, str], out: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, "--out", str(out), *flags], cwd=ROOT, env=programs, stderr=subprocess.PIPE, text=True
    )


def finish(*children: subprocess.Popen) -> None:
    for child in children:
        _, said = child.communicate(timeout=300)
        assert child.returncode == 0, said


def kill_at(moment: Moment, delay: float, *children: subprocess.Popen) -> None:
    while not moment() and all(child.poll() is None for child in children):
        time.sleep(0.005)
    time.sleep(delay)
    for child in children:
        child.kill()
    for child in children:
        _, said = child.communicate()
        assert child.returncode == -signal.SIGKILL, said  # else it came to its end


def answered(out: Path, lines: int) -> Moment:
    """When so many lines have been answered since now."""

    def count() -> int:
        return sum(journal.read_bytes().count(b"\n") for journal in out.glob("*/cells/*/*/journal/*.jsonl"))

    before = count()
    return lambda: count() >= before + lines


def written(out: Path, pattern: str) -> Moment:
    """When a file is written, for the first time or once more."""

    def files() -> set[tuple[str, int, int]]:
        found = set()
        for path in out.glob(pattern):
            try:
                found.add((str(path), path.stat().st_ino, path.stat().st_mtime_ns))
            except FileNotFoundError:  # gone since
                continue
        return found

    before = files()
    return lambda: bool(files() - before)


@pytest.mark.slow
def test_killed_ten_times_it_ends_as_if_it_had_not_been(command, programs, expected, tmp_path):
    """While it starts, while it answers, and at each kind of file that it makes of the answers."""
    moments = random.Random(0)
    kill_at(lambda: True, moments.uniform(0, 3), start(command, programs, tmp_path))
    child = start(command, programs, tmp_path)
    kill_at(written(tmp_path, "*/config.json"), 0, child)
    for _ in range(3):
        child = start(command, programs, tmp_path)
        kill_at(answered(tmp_path, moments.randint(1, 4)), moments.uniform(0, 0.1), child)
    assert not list(tmp_path.rglob("predictions.jsonl"))
    made = ("cells/*/*/.telemetry.jsonl.*", "cells/*/*/predictions.jsonl", "cells/*/*/metrics.json", "metrics.json")
    for name in (*made, "summary-512.csv"):
        child = start(command, programs, tmp_path)
        kill_at(written(tmp_path, f"*/{name}"), moments.uniform(0, 0.01), child)
    finish(start(command, programs, tmp_path))
    assert contents(tmp_path) == expected
    assert not [path for path in tmp_path.rglob(".*.*") if path.is_file()]  # files that were under way


@pytest.mark.slow
def test_two_processes_killed_together_end_as_one_that_was_not(command, programs, expected, tmp_path):
    def pair() -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        hosts = ["--distributed.coordinator", f"localhost:{port}", "--distributed.processes", "2"]
        return [
            start(command, programs, tmp_path, *hosts, "--distributed.process", str(process)) for process in range(2)
        ]

    for moment in (answered(tmp_path, 3), written(tmp_path, "*/cells/*/*/predictions.jsonl")):
        kill_at(moment, 0, *pair())
    with held(next(tmp_path.glob("tiny__full__*")) / ".lock"):  # by another run
        children = pair()
        said = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [2, 2], said
    assert f"is being written by process {os.getpid()} on" in said[0]
    assert "eval: the first process cannot begin, and says why" in said[1]
    finish(*pair())
    assert contents(tmp_path) == expected


@dataclass(frozen=True)
class MadeUp(Cell):
    """Five questions that need no model."""

    metric = "all"

    @property
    def identity(self):
        return {"name": self.task, "length": self.length}

    def question(self, line):
        raise NotImplementedError


CELLS = [MadeUp("single", length, 5, cast(Prompts, None)) for length in (512,)]


def go_on(out: Path, kept: set[Path]) -> None:
    """What an evaluation does with answers that are made up. None that was `kept` is asked for again."""
    runs = []
    for one in chosen(["full", {"name": "streaming", "k": 16}], ()):
        settings = {"policy": {"name": one.name, **one.knobs}, "model": {"name": "tiny"}}
        runs.append(Run(one, RunFolder(out, f"tiny__{one.title}", settings, "abc", fresh=False)))
    with ExitStack() as folders:
        for run in runs:
            folders.enter_context(run.folder.held())
        for cell in CELLS:
            for run in runs:
                folder = run.cell(cell)
                done = folder.answers()
                for _, lines in batches(cell, 2):
                    if missing := [made_up(run.chosen.name, line) for line in lines if line not in done]:
                        asked = {folder.path / str(answer.line) for answer in missing}
                        assert not asked & kept
                        folder.append(missing)
                        kept |= asked
        assert write_results(CELLS, runs, runs[0], 1000, 2)
        for run in runs:
            run.folder.add_invocation({"batch": 2})


def made_up(policy: str, line: int) -> Answer:
    counts = {"prompt_tokens": 500, "gen_tokens": 3, "policy_steps": 2, "density": 0.5}
    read = {"kv_bytes_per_step": 10, "dense_kv_bytes_per_step": 20}
    score = 100.0 if policy == "full" or line % 2 else 0.0
    others = {"line": line, "score": score, "stop": "eos", "meta": {}, **counts, **read}
    layers = [{"refreshes": [1], "overlap": [0.5], "coverage_by_age": None}]
    seconds = {"line": line, "prefill": 1.0, "decode": 0.5, "steps": 2} if line % 2 == 0 else None
    return Answer({"pred": f"{policy} {line}", "others": others}, {"line": line, "layers": layers}, seconds)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def killed(out: Path, kept: set[Path], number: int) -> bool:
    """Goes on, but for the change of a file that has the number, and all after it; whether it came so far."""
    left = number

    def counted(change: Callable, *args, **options):
        nonlocal left
        mode = args[1] if change is OPEN else "w"
        if mode.startswith("r"):
            return change(*args, **options)
        left -= 1
        if left > 0:
            return change(*args, **options)
        if change is OPEN and mode.startswith("w"):
            change(*args, **options).close()  # what was there is gone, and nothing has come for it
        raise Killed

    with pytest.MonkeyPatch.context() as patched:
        for name in ("replace", "unlink", "rmdir", "mkdir", "truncate"):
            patched.setattr(os, name, partial(counted, getattr(os, name)))
        patched.setattr(os, "fsync", partial(counted, lambda file: None))  # which takes long, and changes nothing here
        patched.setattr(io, "open", partial(counted, OPEN))  # which Path.open calls
        try:
            go_on(out, kept)
        except Killed:
            return True
    return False


def test_killed_at_any_change_of_a_file_it_ends_the_same(tmp_path):
    go_on(tmp_path / "whole", set())
    whole = contents(tmp_path / "whole")
    assert len(whole) == 2 * (4 + 4)  # of each run four files of the cell, config, metrics and two tables
    number = 1
    while killed(out := tmp_path / f"{number}", kept := set(), number):
        assert contents(out).items() <= whole.items()  # what is there is all there
        if number % 4 == 0:
            killed(out, kept, number // 2)  # while it recovers, too
        assert not killed(out, kept, 1000)
        assert contents(out) == whole
        assert {path.name for path in out.rglob(".*")} == {".lock"} and not list(out.rglob("journal"))
        number += 1
    assert number > 100
