"""Runs read from their folders and set side by side."""

import csv
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.compare import compare
from eval.finished.text import markdown_table, shown_bytes, signed
from eval.metrics import paired_interval
from tests.eval.made_up_runs import DOCUMENTS, TOKENS, read_lines, write, write_lines, write_runs


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path)


def _cells(text: str, task: str, length: int) -> dict:
    """A row's runs by label."""
    row = next(row for row in json.loads(text)["rows"] if (row["task"], row["length"]) == (task, length))
    return row["runs"]


def test_scores_differences_and_costs_are_those_worked_out_by_hand(runs):
    found = _cells(compare(runs, form="json"), "single", 512)
    assert list(found) == ["full (dense)", "recycled, k 32", "recycled, k 64", "snapkv, k 32", "snapkv, k 64"]
    assert [one["score"] for one in found.values()] == [100, 80, 90, 50, 70]
    assert [one["difference"] for one in found.values()] == [None, -20, -10, -50, -30]
    assert [one["decode_ratio"] for one in found.values()] == pytest.approx([None, 2.0, 1.6, 8 / 3.5, 8 / 4.4])
    assert found["recycled, k 32"]["kv_bytes_per_step"] == 1000 * 32 * 512 // 64
    assert found["recycled, k 32"]["effective_stride"] == pytest.approx((8 + 4 + 8) / 3)
    assert found["snapkv, k 32"]["effective_stride"] is None
    low, high = paired_interval([100.0] * 8 + [0.0] * 2, [100.0] * 10)
    assert [found["recycled, k 32"][name] for name in ("low", "high", "n_common")] == [low, high, 10]


def test_perplexities_are_compared_by_their_ratio(runs):
    found = _cells(compare(runs, form="json"), "perplexity", 512)
    mean = np.mean([1 + 0.1 * document for document in range(DOCUMENTS)])
    assert found["full (dense)"]["ppl"] == pytest.approx(math.exp(mean))
    ratio = math.exp(0.1 * (TOKENS - 1) / TOKENS)  # no difference at the first token
    assert found["recycled, k 32"]["ppl_ratio"] == pytest.approx(ratio)
    assert found["recycled, k 32"]["ppl"] == pytest.approx(math.exp(mean) * ratio)
    assert found["recycled, k 32"]["low"] == pytest.approx(ratio)  # all documents lose alike
    assert found["recycled, k 32"]["n_common"] == DOCUMENTS and found["recycled, k 32"]["difference"] is None


def test_examples_pair_by_line_and_only_those_in_common_count(runs):
    """Records in another order, and half of them missing: wrong pairs would give another interval or difference."""
    file = runs[1] / "cells/single/512/predictions.jsonl"
    write_lines(file, [record for record in reversed(read_lines(file)) if record["others"]["line"] >= 5])
    dense = runs[0] / "cells/single/512/predictions.jsonl"
    records = read_lines(dense)
    records[9]["others"]["score"] = 0.0  # where the other one is wrong too
    write_lines(dense, records)
    one = _cells(compare(runs[:2], form="json"), "single", 512)["recycled, k 32"]
    low, high = paired_interval([100, 100, 100, 0, 0], [100, 100, 100, 100, 0])
    assert [one[name] for name in ("score", "difference", "n_common", "low", "high")] == [60, -20, 5, low, high]


def test_other_examples_are_refused_unless_unpaired_and_the_heading_says_so(runs):
    task = runs[1] / "cells/single/512/task.json"
    write(task, json.loads(task.read_text()) | {"hash": "other"})
    with pytest.raises(ValueError, match=r"cell single 512 has the hashes single-512 and other; expected the same"):
        compare(runs, form="md")
    text = compare(runs, form="md", unpaired=True)
    assert "UNPAIRED" in text.splitlines()[0] and "UNPAIRED" not in text.split("\n", 1)[1]
    found = json.loads(compare(runs, form="json", unpaired=True))
    assert found["paired"] is False
    one = _cells(json.dumps(found), "single", 512)["recycled, k 32"]
    assert one["difference"] == -20 and one["low"] < -20 < one["high"]
    assert "recycled, k 32: difference (unpaired)" in compare(runs, form="csv", unpaired=True).splitlines()[0]


def test_markdown_keeps_ruler_style_tasks_apart_and_says_what_they_are(runs):
    text = compare(runs[:2], form="md")
    assert "80.0 (−20.0 [−50.0, 0.0], n 10)" in text and "2.00×, 256 kB, stride 6.7" in text
    heading = "## Tasks, RULER-style, not comparable with published RULER scores"
    before, after = text.split(heading)
    assert "rs_needle" not in before and "rs_needle 1024" in after and "single" not in after


def test_csv_has_the_same_numbers(runs):
    rows = list(csv.DictReader(io.StringIO(compare(runs, form="csv"))))
    row = next(row for row in rows if (row["task"], row["length"]) == ("rs_needle", "1024"))
    assert float(row["recycled, k 32: score"]) == pytest.approx(500 / 6)
    assert float(row["snapkv, k 64: difference"]) == pytest.approx(-200 / 6)
    assert row["note"] == "RULER-style, not comparable with published RULER scores"


@pytest.mark.parametrize("field", ["device", "batch", "mode"])
def test_no_ratio_of_times_between_devices_batches_or_modes(runs, field):
    paths = {"device": "run_meta.json", "batch": "cells/single/512/timing.json", "mode": "config.json"}
    path = runs[1] / paths[field]
    value = json.loads(path.read_text())
    if field == "device":
        value[0]["device"]["kind"] = "TPU v5e"
    else:
        value[field] = {"batch": 6, "mode": "mask"}[field]
    write(path, value)
    found = _cells(compare(runs, form="json"), "single", 512)
    assert found["recycled, k 32"]["decode_ratio"] is None and found["recycled, k 64"]["decode_ratio"] == 1.6


def test_a_failed_example_counts_as_wrong_until_it_is_answered(runs):
    file = runs[1] / "cells/single/512/predictions.jsonl"
    records = read_lines(file)
    failed = json.loads(json.dumps(records[0]))
    del failed["others"]["score"]
    failed["others"]["error"] = "non-finite logits"
    write_lines(file, [failed, *records[1:]])
    assert _cells(compare(runs, form="json"), "single", 512)["recycled, k 32"]["score"] == 70
    write_lines(file, [failed, *records])
    assert _cells(compare(runs, form="json"), "single", 512)["recycled, k 32"]["score"] == 80


def test_prediction_folders_of_ruler_are_scored_and_paired_by_line(tmp_path):
    for model, answers in {"a": ["it is 11", "22"], "b": ["it is 11", "2"]}.items():
        for task in ("niah_single_1", "qa_1"):
            records = [
                {"index": 7, "pred": pred, "input": "…", "outputs": [right, "33"], "others": {}, "truncation": -1}
                for pred, right in zip(answers, ("11", "22"), strict=True)
            ]
            path = tmp_path / model / "synthetic" / "4096" / "pred" / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(path, records)
    folders = [tmp_path / "a/synthetic/4096", tmp_path / "b/synthetic"]  # one length, and all of them
    text = compare(folders, form="json")
    assert [one["score"] for one in _cells(text, "niah_single_1", 4096).values()] == [50, 25]
    assert [one["score"] for one in _cells(text, "qa_1", 4096).values()] == [100, 50]
    assert list(_cells(text, "qa_1", 4096)) == ["a: synthetic", "b: synthetic"]
    assert _cells(text, "qa_1", 4096)["b: synthetic"]["difference"] == -50
    records = read_lines(path)
    records[1]["outputs"] = ["44"]
    write_lines(path, records)
    with pytest.raises(ValueError, match="cell qa_1 4096 has other references in line 1"):
        compare(folders, form="md")


def test_bad_arguments_are_told(tmp_path, runs):
    with pytest.raises(ValueError, match=r"runs=\[\] is empty"):
        compare([], form="md")
    with pytest.raises(ValueError, match="form='html' is unknown; expected one of md, csv, json"):
        compare(runs, form="html")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"has neither config\.json nor pred"):
        compare([tmp_path / "nothing"], form="md")


@given(st.floats(min_value=0, max_value=1e15))
def test_bytes_keep_three_digits(count):
    number, unit = shown_bytes(count).split()
    size = float(number) * 1000 ** ("B", "kB", "MB", "GB", "TB").index(unit)
    assert size == pytest.approx(count, rel=6e-3)


def test_signs_and_tables():
    assert [signed(value) for value in (1.25, -3, 0.0, -0.01)] == ["+1.2", "−3.0", "0.0", "0.0"]
    assert markdown_table(["a|b", "c"], [["x", "yyyy"]]).splitlines()[-1] == "| x    | yyyy |"
