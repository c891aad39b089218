"""The pictures of a report: what is drawn is what their rows say, and the rows are right."""

import csv
import io
import json

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection, QuadMesh
from matplotlib.lines import Line2D

from eval.finished.read import read_run
from eval.report.bench_tables import bench_tables
from eval.report.pictures import pictures
from eval.report.pictures.bench import bench_curves
from eval.report.pictures.panels import GUIDE
from eval.report.pictures.picture import Picture
from eval.report.pictures.scores import score_against_latency
from eval.report.pictures.shown import show
from tests.eval.made_up_runs import (
    DECODE_MS,
    POLICIES,
    bench_record,
    picture_names,
    write,
    write_lines,
    write_run,
    write_runs,
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, Picture]:
    found, missing = pictures([read_run(path) for path in write_runs(tmp_path_factory.mktemp("runs"))])
    assert missing == []
    return {picture.name: picture for picture in found}


def _rows(picture: Picture) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(picture.csv(), newline="")))


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


def test_all_that_there_are_data_for_is_drawn(drawn):
    assert drawn.keys() == picture_names()


@pytest.mark.parametrize("name", sorted(picture_names()))
def test_every_plotted_number_is_found_in_the_rows(drawn, name):
    values = set()
    for row in _rows(drawn[name]):
        for text in row.values():
            try:
                values.add(float(text))
            except ValueError:
                continue
    plotted = _numbers(drawn[name])
    assert len(plotted) > 3
    assert [number for number in plotted if number not in values] == []


@pytest.mark.parametrize("name", sorted(picture_names()))
def test_every_picture_names_device_and_mode_and_ruler_style_where_it_is(drawn, name):
    told = drawn[name].figure.get_supxlabel()
    mode = "mask" if name.startswith("coverage") else "gather"
    assert ("TPU v5e × 4" if name == "bench_0" else "cpu × 1") in told and f"{mode} mode" in told
    has_ruler_style = any(row.get("task", "").startswith("rs_") for row in drawn[name].rows)
    assert ("not comparable with published RULER scores" in told) == has_ruler_style


def test_pictures_hold_the_numbers_worked_out_by_hand(drawn):
    budget = {(r["label"], r["task"]): float(r["value"]) for r in _rows(drawn["score_against_budget_512"])}
    assert budget["recycled, k 32", "single"] == 80 and budget["full (dense)", "single"] == 100
    latency = [row for row in _rows(drawn["score_against_latency_512"]) if row["task"] == "single"]
    assert {float(row["decode_ms"]) for row in latency} == set(DECODE_MS.values())
    front = {row["label"] for row in latency if row["on_front"] == "True"}
    assert front == {"full (dense)", "recycled, k 32", "recycled, k 64", "snapkv, k 32"}
    ratio = [row for row in _rows(drawn["perplexity_by_position_512"]) if row["label"] == "snapkv, k 32"]
    assert [(row["from"], row["to"]) for row in ratio] == [("0", "15"), ("16", "31"), ("32", "39")]
    # 0.1 + 0.01 i more nats at position i, none at the first
    expected = np.exp([(15 * 0.1 + 1.2) / 16, 0.1 + 0.235, 0.1 + 0.355])
    assert [float(row["ratio"]) for row in ratio] == pytest.approx(expected)
    needle = {
        (r["label"], r["length"], r["depth"]): float(r["difference"])
        for r in _rows(drawn["needle_difference_rs_needle"])
    }
    assert needle["snapkv, k 32", "512", "50"] == -100 and needle["snapkv, k 32", "512", "0"] == 0
    assert needle["recycled, k 32", "1024", "50"] == -50
    lengths = {(r["label"], r["task"]): float(r["ratio"]) for r in _rows(drawn["output_length_512"])}
    assert lengths["snapkv, k 32", "single"] == 1.5 and lengths["recycled, k 64", "single"] == 9 / 8
    coverage = [
        r for r in _rows(drawn["coverage_by_age_512"]) if (r["label"], r["task"]) == ("recycled, k 32", "single")
    ]
    at_two = next(row for row in coverage if row["steps_since_refresh"] == "2")
    assert [float(at_two[name]) for name in ("coverage", "low", "high")] == pytest.approx([0.73, 0.68, 0.78])
    never = [
        row for row in _rows(drawn["stride_by_layer_512"]) if row["label"] == "snapkv, k 32" and row["task"] == "single"
    ]
    assert [(row["stride"], float(row["shown"])) for row in never] == [("", 11)] * 3


def test_void_and_out_of_memory_records_are_told_and_not_drawn(tmp_path):
    key = POLICIES[1]
    runs = [write_run(tmp_path, *one) for one in (POLICIES[0], key)]
    write_lines(runs[0] / "bench.jsonl", [bench_record(POLICIES[0], 512)])
    records = [
        bench_record(key, 512),
        bench_record(key, 1024, valid=False),
        bench_record(key, 2048, status="oom", valid=False),
        bench_record(key, 512) | {"kind": "static_estimate"},
    ]
    write_lines(runs[1] / "bench.jsonl", records)
    read = [read_run(run) for run in runs]
    measured, estimated = bench_curves(show(read))
    assert "measured" in measured.title and "estimated, not measured" in estimated.title
    assert {row["kind"] for row in estimated.rows} == {"static_estimate"}
    assert "1 void records are not drawn" in measured.caption
    [axes] = measured.figure.axes
    lines = [line for line in axes.get_lines() if line.get_color() == "#0072B2"]
    assert all(list(np.asarray(line.get_xdata())) == [512] for line in lines)
    assert ["memory" in text.get_text() for text in axes.texts] == [True]
    states = [row[-1] for table in bench_tables(read) for row in table.rows if len(row) > 1]
    assert states == ["ok", "ok", "void: dense runs drifted", "oom", "ok"]


def test_times_of_different_devices_are_in_different_pictures(tmp_path):
    runs = [write_run(tmp_path, *key) for key in POLICIES[:3]]
    meta = json.loads((runs[2] / "run_meta.json").read_text())
    meta[0]["device"]["kind"] = "TPU v5e"
    write(runs[2] / "run_meta.json", meta)
    found = [p for p in score_against_latency(show([read_run(run) for run in runs])) if "_512" in p.name]
    assert [{row["device"] for row in picture.rows} for picture in found] == [{"cpu × 1"}, {"TPU v5e × 1"}]
    assert len({picture.name for picture in found}) == 2
