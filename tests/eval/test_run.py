"""`python -m eval` on a tiny random model: what it writes, how it goes on, and what it refuses."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from eval import work
from eval.__main__ import main
from eval.compare import compare
from eval.lock import held
from eval.provenance import commit
from tests.recycled_jax.tiny import save_tiny

ARGUMENTS = ["--lengths", "[512]", "--examples", "3", "--batch", "2"]
POLICIES = ["--policies", "[full, {name: streaming, k: 16}]"]
TASKS = ["--tasks", "[single]"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=1))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """A whole run of two policies, with perplexity and turns too."""
    out = tmp_path_factory.mktemp("finished")
    tasks = ["--tasks", "[single, rs_multiturn, {name: perplexity, scored: 8}]", "--preset", "small"]
    assert main(["--model", model, "--out", str(out), *ARGUMENTS, *POLICIES, *tasks, "--analysis", "1"]) == 0
    return out


def contents(out: Path, *, task: str = "*") -> dict[str, bytes]:
    """All that must not depend on how often a run was interrupted, nor on who made it."""
    names = ("predictions.jsonl", "telemetry.jsonl", "metrics.json", "task.json")
    found = (path for name in names for path in out.glob(f"*/cells/{task}/*/{name}"))
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def records(out: Path, policy: str, task: str) -> list[dict]:
    [path] = out.glob(f"tiny__{policy}__*/cells/{task}/512/predictions.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_policy_answers_every_question(finished):
    assert len(contents(finished)) == 2 * 3 * 4
    for policy in ("full", "streaming-k16"):
        single = records(finished, policy, "single")
        assert [record["others"]["line"] for record in single] == [0, 1, 2]
        for record in single:
            assert record["outputs"][0] in record["input"]  # the fact to be found
            assert record["length"] <= 512 and record["truncation"] == 0
            assert record["others"]["policy_steps"] == (0 if policy == "full" else record["others"]["gen_tokens"] - 1)
        turns = records(finished, policy, "rs_multiturn")
        assert [record["others"]["meta"]["turn"] for record in turns] == [1, 2, 3] * 3
        assert turns[1]["input"].startswith(turns[0]["input"])
        nll = [record["others"]["nll"] for record in records(finished, policy, "perplexity")]
        assert [len(row) for row in nll] == [8, 8, 8]
    full, streaming = (records(finished, policy, "perplexity") for policy in ("full", "streaming-k16"))
    for ours, dense in zip(streaming, full, strict=True):
        assert ours["others"]["nll"][0] == pytest.approx(dense["others"]["nll"][0])  # of the prompt
        assert ours["others"]["nll"][1] != pytest.approx(dense["others"]["nll"][1])


def test_metrics_stand_beside_the_dense_ones(finished):
    [path] = finished.glob("tiny__streaming-k16__*/metrics.json")
    cells = {cell["task"]: cell for cell in json.loads(path.read_text())["cells"]}
    assert cells["single"]["dense"]["run"].startswith("tiny__full__")
    assert cells["single"]["dense"]["note"] == "ceiling too low"  # a random model knows nothing
    assert set(cells["rs_multiturn"]["extras"]) >= {"turn_1", "turn_2", "control"}
    assert cells["perplexity"]["ppl"] > 1 and cells["perplexity"]["tokens"] == 24
    assert cells["single"]["kv_bytes_per_step"] < cells["single"]["dense_kv_bytes_per_step"]
    assert (path.parent / "summary-512.csv").read_text().startswith("0,1,2\nTasks,rs_multiturn,single\n")
    [line] = json.loads((path.parent / "run_meta.json").read_text())
    assert line["processes"] == 1 and line["batch"] == 2
    assert line["seconds"] > line["compile_seconds"] > 0
    assert 2**26 < line["peak_memory_bytes"]["process"] < 2**40 and line["peak_memory_bytes"]["device"] is None
    assert line["git"] == commit() and line["arguments"] == sys.argv[1:]


def test_an_interrupted_run_goes_on_to_the_same_bytes(finished, model, tmp_path, monkeypatch):
    command = ["--model", model, "--out", str(tmp_path), *ARGUMENTS, *POLICIES, *TASKS, "--analysis", "1"]
    append, calls = work.CellFolder.append, []

    def torn(self, answers):
        append(self, answers)
        calls.append(answers)
        if len(calls) == 3:  # the first policy's last batch
            [journal] = (self.path / "journal").iterdir()
            journal.write_bytes(journal.read_bytes()[:-20])
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(work.CellFolder, "append", torn)
        assert main(command) == 130
    assert not list(tmp_path.glob("*/cells/*/*/predictions.jsonl"))
    assert main(command) == 0
    expected = contents(finished, task="single")
    assert contents(tmp_path) == expected
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("journal")}
    assert main(command) == 0  # nothing is left to do
    assert contents(tmp_path) == expected and not before


def test_two_processes_share_the_work(finished, model, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "eval", "--model", model, "--out", str(tmp_path), *ARGUMENTS, *POLICIES, *TASKS]
    hosts = ["--analysis", "1", "--distributed.coordinator", f"localhost:{port}", "--distributed.processes", "2"]
    both = [
        subprocess.Popen([*command, *hosts, "--distributed.process", str(process)], stderr=subprocess.PIPE, text=True)
        for process in range(2)
    ]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert contents(tmp_path) == contents(finished, task="single")


def test_a_failed_cell_does_not_stop_the_others(finished, model, tmp_path, monkeypatch, capsys):
    generated = work.answering.generated

    def broken(model, params, prefilled, questions, chosen, *rest, **options):
        if chosen.name == "streaming":
            raise RuntimeError("the chip is on fire")
        return generated(model, params, prefilled, questions, chosen, *rest, **options)

    command = ["--model", model, "--out", str(tmp_path), *ARGUMENTS, *POLICIES, *TASKS, "--analysis", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(work.answering, "generated", broken)
        assert main(command) == 1
    assert "lacks 3 of 3 answers" in capsys.readouterr().err
    [error] = tmp_path.glob("*/cells/single/512/error.json")
    assert "lacks" not in compare(sorted(tmp_path.iterdir()), form="md")  # of what is there
    assert json.loads(error.read_text())["error"] == "RuntimeError: the chip is on fire"
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"results in {tmp_path}; as a table: python -m eval compare {tmp_path}/*\n")
    assert not error.exists() and contents(tmp_path) == contents(finished, task="single")


def figures(out: Path, policy: str) -> list[dict]:
    [path] = out.glob(f"tiny__{policy}__*/metrics.json")
    return json.loads(path.read_text())["cells"]


def test_the_dense_run_of_an_earlier_command_is_beside_a_later_one(finished, model, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    command = ["--model", model, "--out", str(out), *ARGUMENTS, *TASKS, "--policies", "[{name: streaming, k: 16}]"]
    command += ["--preset", "small", "--analysis", "1"]
    assert main(command) == 0
    assert contents(out) == contents(finished)
    assert main([*command, "--examples", "2"]) == 0  # of three that are there
    assert contents(out) == contents(finished)
    [task] = out.glob("tiny__full__*/cells/single/512/task.json")
    task.write_text(task.read_text().replace('"seed": 42', '"seed": 43'))
    assert main(command) == 0
    without = [cell["task"] for cell in figures(out, "streaming-k16") if cell["dense"] is None]
    assert without == ["perplexity", "single"]  # the first never is beside a dense one


def test_other_analysis_is_another_run(finished, model, tmp_path):
    """Telemetry would be of both kinds, depending on which lines were answered when."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    command = ["--model", model, "--out", str(tmp_path), *ARGUMENTS, *TASKS, "--policies", "[{name: streaming, k: 16}]"]
    assert main([*command, "--preset", "small", "--analysis", "0"]) == 0
    before, after = contents(finished), contents(tmp_path)
    assert before.items() < after.items()
    [telemetry] = [after[name] for name in after.keys() - before.keys() if name.endswith("telemetry.jsonl")]
    assert [json.loads(line)["layers"][0]["coverage_by_age"] for line in telemetry.splitlines()] == [None] * 3
    [measured] = finished.glob("tiny__streaming-k16__*/cells/single/512/telemetry.jsonl")
    known = [json.loads(line)["layers"][0]["coverage_by_age"] is not None for line in measured.read_text().splitlines()]
    assert known == [True, True, False]  # of the first batch


def test_two_runs_do_not_write_to_one_folder(finished, model, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    [run] = tmp_path.glob("tiny__streaming*")
    command = ["--model", model, "--out", str(tmp_path), *ARGUMENTS, *POLICIES, *TASKS, "--analysis", "1"]
    before = contents(tmp_path)
    with held(run / ".lock"):
        assert main(command) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"eval: out: {run} is being written by process {os.getpid()} on" in said
        assert contents(tmp_path) == before
    assert main(command) == 0


def test_where_memory_does_not_do_half_a_batch_is_answered_at_a_time(model, tmp_path, monkeypatch):
    generated, rows = work.answering.generated, []

    def small(model, params, prefilled, questions, *rest, **options):
        rows.append(len(questions))
        if len(questions) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return generated(model, params, prefilled, questions, *rest, **options)

    monkeypatch.setattr(work.answering, "generated", small)
    policies = ["--policies", "[full]"]
    assert main(["--model", model, "--out", str(tmp_path), *ARGUMENTS, *policies, *TASKS]) == 0
    assert rows == [2, 1, 1, 1]
    assert [record["others"]["line"] for record in records(tmp_path, "full", "single")] == [0, 1, 2]


def test_a_file_of_ruler_is_asked_as_it_stands(model, tmp_path):
    lines = [
        {"index": 7, "input": f"The key is {key}. What is the key?", "answer_prefix": " It is", "outputs": [str(key)]}
        for key in (11, 22)
    ]
    long = {"index": 7, "input": "word " * 500, "outputs": ["x"]}
    path = tmp_path / "vt.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, long]))
    command = ["--model", model, "--out", str(tmp_path / "out"), "--batch", "2", "--lengths", "[64]"]
    tasks = ["--tasks", f"[{{name: ruler, path: {path}, task: vt, gen_tokens: 4}}]", "--policies", "[full]"]
    assert main([*command, *tasks, "--max_length", "100"]) == 1  # one does not fit
    [predictions] = (tmp_path / "out").glob("*/cells/vt/*/predictions.jsonl")
    found = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [record["index"] for record in found] == [7, 7, 7]
    assert [record["input"] for record in found[:2]] == [line["input"] + " It is" for line in lines]
    assert "expected at most max_length=100" in found[2]["others"]["error"]
    metrics = json.loads((predictions.parent / "metrics.json").read_text())
    assert (metrics["n"], metrics["failed"]) == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "[rs_vd]"], "tasks has 'rs_vd', which is unknown; did you mean 'rs_vt'?"),
        (["--tasks", "[{name: rs_vt, hop: 3}]"], "the task rs_vt has no setting 'hop'; did you mean 'hops'?"),
        (["--policies", "[recycledd]"], "policy='recycledd' is unknown; did you mean 'recycled'?"),
        (["--policies", "[{name: recycled, j: 3}]"], "policy.j is not a knob of 'recycled'"),
        (["--policies", "[full, full]"], "policies has full twice with the same knobs, expected each once"),
        (["--lengths", "[4096]"], "lengths has 4096, expected at most max_length=2048"),
        (["--examples", "0"], "examples=0 must be at least 1"),
        (["--batches", "2"], "'batches' is not a setting; did you mean 'batch'?"),
        (["--haystack", "nowhere.txt", "--tasks", "[single]"], "nowhere.txt"),
        (["--template", "chat"], "template='chat' needs a tokenizer with a chat template"),
        (["--tasks", "[ruler]"], "the task ruler has no path"),
        (["--tasks", "[{name: perplexity, documents: [short.txt]}]"], "documents have 5 tokens at most, expected 512"),
        (["--tasks", "[{name: ruler, path: torn.jsonl, task: vt}]"], "torn.jsonl, line 2: "),
        (["--tasks", "[single, {name: single, digits: 5}]"], "tasks has single twice at length 512, expected another"),
        (["--tasks", "[{name: rs_vt, hops: many}]"], "the task rs_vt with {'hops': 'many'} cannot be made"),
        (["--model", "nowhere"], "nowhere"),
        (["--out", "/proc/nothing"], "/proc/nothing"),
    ],
)
def test_bad_input_ends_in_one_sentence(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("word")
    (tmp_path / "torn.jsonl").write_text('{"index": 0, "input": "a", "outputs": ["b"]}\n{"index": 1, "inp')
    before = sorted(tmp_path.rglob("*"))
    assert main(["--model", model, "--out", "out", *ARGUMENTS, *arguments]) == 2
    captured = capsys.readouterr().err.strip().splitlines()[-1]
    assert captured.startswith("eval: ") and message in captured
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_another_config_is_refused(finished, model, tmp_path, capsys):
    [run] = finished.glob("tiny__full__*")
    copy = tmp_path / run.name
    copy.mkdir()
    config = json.loads((run / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "question": "decode"}))
    command = ["--model", model, "--out", str(tmp_path), *ARGUMENTS, "--policies", "[full]", *TASKS]
    assert main([*command, "--analysis", "1"]) == 2
    assert "was made with question='decode', this run has 'prefill'" in capsys.readouterr().err
