"""Run folders read back, and the names of the runs."""

import json

import pytest

from eval.finished.names import labels
from eval.finished.read import read_run, read_runs
from tests.eval.made_up_runs import POLICIES, read_lines, write, write_lines, write_run


@pytest.mark.parametrize(
    ("name", "number", "text", "message"),
    [
        ("cells/single/512/predictions.jsonl", 3, '{"index": 2, "pre', r"predictions\.jsonl, line 3: "),
        ("cells/single/512/predictions.jsonl", 2, '{"pred": 5, "others": {}}', r"line 2: pred=5; expected str"),
        (
            "cells/single/512/predictions.jsonl",
            1,
            '{"pred": "", "outputs": [], "others": {}}',
            "neither score, nll nor",
        ),
        ("cells/single/512/telemetry.jsonl", 4, '{"line": 3, "layers": 5}', r"telemetry\.jsonl, line 4: layers=5"),
        (
            "cells/single/512/metrics.json",
            1,
            '{"kv_bytes_per_step": "many"}',
            r"metrics\.json: kv_bytes_per_step='many'",
        ),
        ("cells/single/512/metrics.json", 1, "[1,]", r"metrics\.json, line 1: "),
        ("bench.jsonl", 2, "[]", r"bench\.jsonl, line 2: expected an object"),
        ("config.json", 1, '{"policy": {"name": "full"}}', r"config\.json: hash=None; expected str"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, number, text, message):
    run = write_run(tmp_path, "full", None)
    lines = (run / name).read_text().splitlines()
    lines[number - 1] = text
    (run / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        read_run(run)


def test_a_line_answered_twice_is_refused(tmp_path):
    run = write_run(tmp_path, "full", None)
    file = run / "cells/single/512/predictions.jsonl"
    records = read_lines(file)
    write_lines(file, [*records, records[4]])
    with pytest.raises(ValueError, match=r"line 11: line=4 was answered before"):
        read_run(run)


def test_runs_of_one_policy_and_budget_tell_their_other_knobs(tmp_path):
    first, second = write_run(tmp_path / "a", "recycled", 32), write_run(tmp_path / "b", "recycled", 32)
    config = json.loads((second / "config.json").read_text())
    write(second / "config.json", config | {"policy": config["policy"] | {"stride": 16}})
    read = [read_run(path) for path in (first, second)]
    assert labels(read) == ["recycled, stride 8, k 32", "recycled, stride 16, k 32"]


def test_a_folder_of_benchmarks_goes_to_the_runs_of_its_policies(tmp_path):
    runs = [write_run(tmp_path / "runs", *key) for key in POLICIES[:2]]
    expected = [run.bench for run in read_runs(runs)]
    with (tmp_path / "bench.jsonl").open("w") as together:
        for run in runs:
            together.write((run / "bench.jsonl").read_text())
            (run / "bench.jsonl").unlink()
    assert [run.bench for run in read_runs([*runs, tmp_path])] == expected
    assert {one.path for one in read_runs([tmp_path])} == {tmp_path}
    assert [run.bench for run in read_runs([tmp_path])] == expected
