"""Run folders: nothing answered is lost, doubled or mixed, wherever a run is killed."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.lock import held
from eval.store import Answer, CellFolder, RunFolder, write_json

ROOT = Path(__file__).parents[2]
IDENTITY = {"name": "single", "length": 512, "seed": 1}


def answer(line, text="x", **others):
    told = {"index": line, "pred": text, "others": {"line": line, **others}}
    return Answer(told, {"line": line, "layers": []}, {"line": line, "decode": 0.5} if line % 2 == 0 else None)


def batches(count, size=3):
    lines = range(count)
    return [[answer(line) for line in lines[first : first + size]] for first in range(0, count, size)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@given(cut=st.integers(0, 2000), after=st.integers(0, 3))
def test_a_run_killed_while_it_writes_ends_as_one_that_was_not(tmp_path_factory, cut, after):
    whole, killed = (tmp_path_factory.mktemp("cell") for _ in range(2))
    for batch in batches(10):
        CellFolder(whole, IDENTITY).append(batch)
    CellFolder(whole, IDENTITY).merge()

    for batch in batches(10)[: after + 1]:
        CellFolder(killed, IDENTITY).append(batch)
    [journal] = (killed / "journal").iterdir()
    journal.write_bytes(journal.read_bytes()[:cut])
    done = CellFolder(killed, IDENTITY).answers()
    for batch in batches(10):
        if missing := [one for one in batch if one.line not in done]:
            CellFolder(killed, IDENTITY).append(missing)
    CellFolder(killed, IDENTITY).merge()
    assert files(killed) == files(whole)
    assert not (killed / "journal").exists()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_many_processes_make_the_file_of_one(tmp_path, processes):
    for number, batch in reversed(list(enumerate(batches(10)))):
        CellFolder(tmp_path, IDENTITY, process=number % processes, processes=processes).append(batch)
    assert len(list((tmp_path / "journal").iterdir())) == processes
    CellFolder(tmp_path, IDENTITY).merge()
    lines = [json.loads(line)["others"]["line"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert lines == list(range(10))
    before = files(tmp_path)
    CellFolder(tmp_path, IDENTITY).merge()  # of what is merged already
    assert files(tmp_path) == before
    more = [answer(line) for line in (10, 11)]
    CellFolder(tmp_path, IDENTITY).append(more)
    assert list(CellFolder(tmp_path, IDENTITY).answers()) == list(range(12))


def test_a_failed_answer_gives_way_and_two_that_differ_do_not(tmp_path):
    folder = CellFolder(tmp_path, IDENTITY)
    folder.append([answer(0, "", error="no memory"), answer(1)])
    assert folder.answers()[0].failed
    folder.append([answer(0, "right")])
    assert folder.answers()[0].prediction["pred"] == "right"
    folder.append([answer(0, "", error="no memory")])
    assert folder.answers()[0].prediction["pred"] == "right"
    folder.append([answer(1, "other")])
    with pytest.raises(ValueError, match="has two answers to line 1, expected one; use --fresh true"):
        folder.answers()


def test_folders_of_something_else_are_refused_and_left_alone(tmp_path):
    CellFolder(tmp_path / "cell", IDENTITY).append([answer(0)])
    with pytest.raises(ValueError, match="was made with seed=1, this run has 2; name another folder"):
        CellFolder(tmp_path / "cell", {**IDENTITY, "seed": 2})
    config = {"model": "tiny", "k": 4}
    first = RunFolder(tmp_path, "tiny__full", config, "abc", fresh=False)
    with first.held():
        pass
    before = files(first.path)
    with pytest.raises(ValueError, match="was made with k=4, this run has 8"):
        RunFolder(tmp_path, "tiny__full", {**config, "k": 8}, "abc", fresh=False)
    assert files(first.path) == before
    assert RunFolder(tmp_path, "tiny__full", config, "abc", fresh=True).path.name == "tiny__full__abc-2"


def test_malformed_lines_are_named(tmp_path):
    CellFolder(tmp_path, IDENTITY).append([answer(0)])
    [journal] = (tmp_path / "journal").iterdir()
    journal.write_text(journal.read_text() + "{]\n")
    with pytest.raises(ValueError, match="line 2: not JSON; remove the line, or use --fresh true"):
        CellFolder(tmp_path, IDENTITY).answers()
    (tmp_path / "task.json").write_text("{")
    with pytest.raises(ValueError, match=r"task\.json is not valid JSON"):
        CellFolder(tmp_path, IDENTITY)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_one_run_at_a_time_writes_to_a_folder(tmp_path):
    one, other = (RunFolder(tmp_path, "tiny__full", {"k": 4}, "abc", fresh=False) for _ in range(2))
    with one.held(), pytest.raises(ValueError) as refused, other.held():
        pass
    who = f"process {os.getpid()} on {socket.gethostname()}"
    assert str(refused.value) == (
        f"out: {one.path} is being written by {who}; wait until it ends, or name another folder"
    )
    with other.held():
        pass


def test_the_lock_of_a_killed_run_is_none(tmp_path):
    program = "import sys, time, pathlib, eval.lock as lock\nwith lock.held(pathlib.Path(sys.argv[1])):\n"
    program += "    print('held', flush=True)\n    time.sleep(600)"
    path = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"is being written by process {child.pid} on"), held(path):
            pass
        child.kill()
        child.wait()
        with held(path):
            assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def without(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with held(tmp_path / ".lock"), held(tmp_path / ".lock"):
        pass
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), held(tmp_path / ".lock"):
        pass
