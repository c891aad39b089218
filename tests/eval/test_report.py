"""The page of a report, and its pictures."""

import base64
import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection, QuadMesh
from matplotlib.lines import Line2D

from eval.pictures import GUIDE, Picture, pictures
from eval.read_runs import read_run, read_runs
from eval.report import report
from tests.eval.made_up_runs import (
    DECODE_MS,
    LENGTHS,
    POLICIES,
    bench_record,
    read_lines,
    write,
    write_lines,
    write_run,
    write_runs,
)

BY_LENGTH = (
    "score_against_budget",
    "score_against_latency",
    "stride_by_layer",
    "coverage_by_age",
    "overlap_by_layer",
    "output_length",
)
NAMES = {f"{name}_{length}" for name in BY_LENGTH for length in LENGTHS} | {
    "perplexity_by_position_512",
    "needle_score_rs_needle",
    "needle_difference_rs_needle",
    "bench_0",
}


class _Page(HTMLParser):
    """What a page refers to, and whether its elements close."""

    def __init__(self, text: str):
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(paths, tmp_path_factory) -> Path:
    return report(paths, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def drawn(paths) -> dict[str, Picture]:
    found, missing = pictures([read_run(path) for path in paths])
    assert missing == []
    return {picture.name: picture for picture in found}


def _only(run: Path, *tasks: str) -> Path:
    """The run with these tasks alone, and without telemetry and bench: fewer pictures, less time."""
    for cell in run.glob("cells/*"):
        if cell.name not in tasks:
            shutil.rmtree(cell)
    for file in [run / "bench.jsonl", *run.glob("cells/*/*/telemetry.jsonl"), *run.glob("cells/*/*/metrics.json")]:
        file.unlink()
    return run


def test_a_folder_of_benchmarks_goes_to_the_runs_of_its_policies(paths, tmp_path):
    runs = [shutil.copytree(path, tmp_path / path.name) for path in paths[:2]]
    expected = [run.bench for run in read_runs(runs)]
    with (tmp_path / "bench.jsonl").open("w") as together:
        for run in runs:
            together.write((run / "bench.jsonl").read_text())
            (run / "bench.jsonl").unlink()
    assert [run.bench for run in read_runs([*runs, tmp_path])] == expected
    assert {one.path for one in read_runs([tmp_path])} == {tmp_path}
    assert [run.bench for run in read_runs([tmp_path])] == expected


def _rows(page: Path, name: str) -> list[dict[str, str]]:
    with page.with_name(f"report_{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _numbers(picture: Picture) -> list[float]:
    """All that is drawn: lines, bars of intervals, bands, maps; x and y."""
    found: list[np.ndarray] = []
    for axes in picture.figure.axes:
        if axes.get_label() == "<colorbar>":
            continue
        for artist in axes.get_children():
            if isinstance(artist, Line2D) and artist.get_gid() != GUIDE:
                data = np.asarray(artist.get_xydata(), float)
                # a line across the panel runs from 0 to 1; of the dots of output lengths only x is a number
                across = artist.get_transform() != axes.transData
                found.append(data[:, 1] if across else data[:, 0] if picture.name.startswith("output") else data)
            elif isinstance(artist, QuadMesh):
                found.append(np.ma.compressed(artist.get_array()))
            elif isinstance(artist, LineCollection | PolyCollection):
                found += [np.asarray(path.vertices) for path in artist.get_paths()]
    return [float(value) for part in found for value in np.ravel(part)]


def test_the_page_stands_alone(page):
    text = page.read_text(encoding="utf-8")
    parsed = _Page(text)
    assert parsed.open == []
    assert parsed.references and all(one.startswith(("data:", "#")) for one in parsed.references)
    assert not re.search(r"https?://|<script|@import|url\(", text)
    anchors = {one[1:] for one in parsed.references if one.startswith("#")}
    assert all(f'id="{anchor}"' in text for anchor in anchors)


def test_every_picture_is_in_the_page_with_its_data(page, drawn):
    text = page.read_text(encoding="utf-8")
    assert drawn.keys() == NAMES
    assert {file.stem.removeprefix("report_") for file in page.parent.glob("*.csv")} == NAMES
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(images) == len(NAMES)
    for image in images:
        svg = base64.b64decode(image).decode()
        assert "<svg" in svg and all(one.startswith(("#", "data:")) for one in re.findall(r'href="([^"]+)"', svg))
    for name in NAMES:
        data = re.search(rf'download="report_{name}\.csv" href="data:text/csv;base64,([^"]+)"', text)
        assert data and base64.b64decode(data.group(1)) == page.with_name(f"report_{name}.csv").read_bytes()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_plotted_number_is_found_in_a_file(page, drawn, name):
    values = set()
    for row in _rows(page, name):
        for text in row.values():
            try:
                values.add(float(text))
            except ValueError:
                continue
    plotted = _numbers(drawn[name])
    assert len(plotted) > 3
    assert [number for number in plotted if number not in values] == []


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_picture_names_device_and_mode_and_ruler_style_where_it_is(drawn, name):
    told = drawn[name].figure.get_supxlabel()
    mode = "mask" if name.startswith("coverage") else "gather"
    assert ("TPU v5e × 4" if name == "bench_0" else "cpu × 1") in told and f"{mode} mode" in told
    has_ruler_style = any(row.get("task", "").startswith("rs_") for row in drawn[name].rows)
    assert ("not comparable with published RULER scores" in told) == has_ruler_style


def test_pictures_hold_the_numbers_worked_out_by_hand(page):
    budget = {(r["label"], r["task"]): float(r["value"]) for r in _rows(page, "score_against_budget_512")}
    assert budget["recycled, k 32", "single"] == 80 and budget["full (dense)", "single"] == 100
    latency = [row for row in _rows(page, "score_against_latency_512") if row["task"] == "single"]
    assert {float(row["decode_ms"]) for row in latency} == set(DECODE_MS.values())
    front = {row["label"] for row in latency if row["on_front"] == "True"}
    assert front == {"full (dense)", "recycled, k 32", "recycled, k 64", "snapkv, k 32"}
    ratio = [row for row in _rows(page, "perplexity_by_position_512") if row["label"] == "snapkv, k 32"]
    assert [(row["from"], row["to"]) for row in ratio] == [("0", "15"), ("16", "31"), ("32", "39")]
    # 0.1 + 0.01 i more nats at position i, none at the first
    expected = np.exp([(15 * 0.1 + 1.2) / 16, 0.1 + 0.235, 0.1 + 0.355])
    assert [float(row["ratio"]) for row in ratio] == pytest.approx(expected)
    needle = {
        (r["label"], r["length"], r["depth"]): float(r["difference"])
        for r in _rows(page, "needle_difference_rs_needle")
    }
    assert needle["snapkv, k 32", "512", "50"] == -100 and needle["snapkv, k 32", "512", "0"] == 0
    assert needle["recycled, k 32", "1024", "50"] == -50
    lengths = {(r["label"], r["task"]): float(r["ratio"]) for r in _rows(page, "output_length_512")}
    assert lengths["snapkv, k 32", "single"] == 1.5 and lengths["recycled, k 64", "single"] == 9 / 8
    coverage = [
        r for r in _rows(page, "coverage_by_age_512") if (r["label"], r["task"]) == ("recycled, k 32", "single")
    ]
    at_two = next(row for row in coverage if row["steps_since_refresh"] == "2")
    assert [float(at_two[name]) for name in ("coverage", "low", "high")] == pytest.approx([0.73, 0.68, 0.78])
    never = [
        row for row in _rows(page, "stride_by_layer_512") if row["label"] == "snapkv, k 32" and row["task"] == "single"
    ]
    assert [(row["stride"], float(row["shown"])) for row in never] == [("", 11)] * 3


def test_the_headline_answers_the_questions_and_markdown_stands_beside(page):
    text, markdown = page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8")
    for question in ("Is it as good?", "Is it faster?", "Why?", "Did the text change?", "Was the policy exercised?"):
        assert f">{question}</th>" in text
    lines = markdown.split("### single, 512 tokens")[1].splitlines()
    row = next(line for line in lines if line.startswith("| snapkv, k 32 "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["50.0 [38.0, 62.0], 10", "100.0", "50.0 %", "−50.0 [−80.0, −20.0], 10"]
    assert cells[5:9] == ["3.50", "2.29×", "50.0", "1.00×"]
    assert cells[9:11] == ["3.78 MB", "6.4 %"]  # 2.5 MB of weights and five rows of 256 kB, of 4 MB each
    assert cells[13] == "no refresh" and cells[16:20] == ["12.0", "1.50×", "0 %", "50 %"]
    style = markdown.split("## Scores, RULER-style tasks")[1].split("## ")[0]
    assert "RULER-style, not comparable with published RULER scores" in style
    assert "| recycled, k 64 " in markdown.split("## Decode time, measured, TPU v5e × 4")[1]
    assert "stride 8" in markdown.split("## Settings")[1]


def test_a_low_ceiling_supports_no_retention(tmp_path):
    runs = [_only(write_run(tmp_path, *key), "single") for key in POLICIES[:2]]
    for run in runs:
        file = run / "cells/single/512/predictions.jsonl"
        records = read_lines(file)
        for record in records[1:]:
            record["others"]["score"] = 0.0
        write_lines(file, records)
    text = report(runs, tmp_path / "page.html").with_suffix(".md").read_text(encoding="utf-8")
    row = next(r for r in text.split("### single, 512")[1].splitlines() if r.startswith("| recycled"))
    assert "ceiling too low" in row and "ceiling too low" not in text.split("### single, 1024")[1]


def test_what_is_missing_is_said(tmp_path):
    run = write_run(tmp_path, "recycled", 32)
    (run / "bench.jsonl").unlink()
    for cell in run.glob("cells/*/*"):
        (cell / "telemetry.jsonl").unlink()
        (cell / "metrics.json").unlink()
    write(run / "cells/single/1024/error.json", {"error": "out of memory <here>", "traceback": "…"})
    (run / "cells/single/1024/predictions.jsonl").unlink()
    text = report([run], tmp_path / "out").read_text(encoding="utf-8")
    for missing in (
        "Score against measured latency: left out, no scored run in gather mode has a decode time.",
        "Perplexity ratio against generated position: left out, no perplexities",
        "Effective stride per layer: left out, no run has refreshed.",
        "Coverage against steps since the refresh: left out, no telemetry has coverage, which needs mask mode.",
        "Overlap of selections per layer: left out, no run has measured overlaps.",
        "Output length against dense: left out, no policy has answered the dense run",
        "Decode time against length: left out, no run has valid records in bench.jsonl.",
        "Failed: single 1024 of recycled, k 32: out of memory &lt;here&gt;",
    ):
        assert missing in text
    assert "Score against budget: left out" not in text
    assert {file.stem for file in (tmp_path / "out").glob("*.csv")} == {
        "report_score_against_budget_512",
        "report_score_against_budget_1024",
        "report_needle_score_rs_needle",
    }


def test_void_and_out_of_memory_records_are_told_and_not_drawn(tmp_path):
    key = POLICIES[1]
    runs = [_only(write_run(tmp_path, *one)) for one in (POLICIES[0], key)]
    write_lines(runs[0] / "bench.jsonl", [bench_record(POLICIES[0], 512)])
    records = [
        bench_record(key, 512),
        bench_record(key, 1024, valid=False),
        bench_record(key, 2048, status="oom", valid=False),
        bench_record(key, 512) | {"kind": "static_estimate"},
    ]
    write_lines(runs[1] / "bench.jsonl", records)
    found = [p for p in pictures([read_run(run) for run in runs])[0] if p.name.startswith("bench")]
    measured, estimated = found
    assert "measured" in measured.title and "estimated, not measured" in estimated.title
    assert {row["kind"] for row in estimated.rows} == {"static_estimate"}
    assert "1 void records are not drawn" in measured.caption
    [axes] = measured.figure.axes
    lines = [line for line in axes.get_lines() if line.get_color() == "#0072B2"]
    assert all(list(np.asarray(line.get_xdata())) == [512] for line in lines)
    assert ["memory" in text.get_text() for text in axes.texts] == [True]
    text = report(runs, tmp_path / "page.html").with_suffix(".md").read_text(encoding="utf-8")
    assert "void: dense runs drifted" in text and "| oom" in text.replace(" " * 20, " ").replace("  ", "")


def test_times_of_different_devices_are_in_different_pictures(tmp_path):
    runs = [write_run(tmp_path, *key) for key in POLICIES[:3]]
    meta = json.loads((runs[2] / "run_meta.json").read_text())
    meta[0]["device"]["kind"] = "TPU v5e"
    write(runs[2] / "run_meta.json", meta)
    found = [p for p in pictures([read_run(run) for run in runs])[0] if p.name.startswith("score_against_latency_512")]
    assert [{row["device"] for row in picture.rows} for picture in found] == [{"cpu × 1"}, {"TPU v5e × 1"}]
    assert len({picture.name for picture in found}) == 2


def test_a_report_needs_runs(tmp_path):
    with pytest.raises(ValueError, match=r"runs=\[\] is empty"):
        report([], tmp_path)
