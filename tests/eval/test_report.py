"""The page of a report, its tables, and the files beside it."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from eval.compare import compare
from eval.finished.read import read_run
from eval.report import report
from eval.report.score_tables import score_tables
from tests.eval.made_up_runs import POLICIES, picture_names, read_lines, write, write_lines, write_run, write_runs

LENGTHS = (512,)  # test_pictures.py draws both
NAMES = picture_names(LENGTHS)


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
def page(tmp_path_factory) -> Path:
    runs = write_runs(tmp_path_factory.mktemp("runs"), LENGTHS)
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context({"svg.fonttype": "none"}):
        # To place panels and outline letters is most of the time, and what no test here looks at.
        patch.setattr(Figure, "get_layout_engine", lambda figure: None)
        return report(runs, tmp_path_factory.mktemp("report"))


def test_the_page_stands_alone(page):
    text = page.read_text(encoding="utf-8")
    parsed = _Page(text)
    assert parsed.open == []
    assert parsed.references and all(one.startswith(("data:", "#")) for one in parsed.references)
    assert not re.search(r"https?://|<script|@import|url\(", text)
    anchors = {one[1:] for one in parsed.references if one.startswith("#")}
    assert all(f'id="{anchor}"' in text for anchor in anchors)


def test_every_picture_is_in_the_page_with_its_data(page):
    text = page.read_text(encoding="utf-8")
    assert {file.stem.removeprefix("report_") for file in page.parent.glob("*.csv")} == NAMES
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(images) == len(NAMES)
    for image in images:
        svg = base64.b64decode(image).decode()
        assert "<svg" in svg and all(one.startswith(("#", "data:")) for one in re.findall(r'href="([^"]+)"', svg))
    for name in NAMES:
        data = re.search(rf'download="report_{name}\.csv" href="data:text/csv;base64,([^"]+)"', text)
        assert data and base64.b64decode(data.group(1)) == page.with_name(f"report_{name}.csv").read_bytes()


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
    runs = [write_run(tmp_path, *key) for key in POLICIES[:2]]
    for run in runs:
        file = run / "cells/single/512/predictions.jsonl"
        records = read_lines(file)
        for record in records[1:]:
            record["others"]["score"] = 0.0
        write_lines(file, records)
    [scores, *_] = score_tables([read_run(run) for run in runs])
    retention = 1 + scores.columns.index("retention")
    assert [row[retention] for row in scores.rows if row[0] == "recycled, k 32"] == ["ceiling too low", "80.0 %"]


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


@pytest.mark.parametrize("failed", [0, 1])
def test_a_cell_of_perplexity_that_failed_has_its_line(tmp_path, failed):
    runs = [write_run(tmp_path, *key, lengths=()) for key in POLICIES[:2]]
    cell = runs[failed] / "cells/perplexity/512"
    (cell / "predictions.jsonl").unlink()
    write(cell / "error.json", {"error": "out of memory"})
    [table] = score_tables([read_run(run) for run in runs])
    heading, *rows = table.rows
    assert heading == ["perplexity, 512 tokens"] and {len(row) for row in rows} == {1 + len(table.columns)}
    assert rows[failed][1:4] == ["failed: out of memory", "–", "–"]
    assert rows[1 - failed][1] == ("3.158, 4", "3.482, 4")[1 - failed]
    assert "| perplexity 512 |" in compare(runs, form="md")


def test_a_report_needs_runs(tmp_path):
    with pytest.raises(ValueError, match=r"runs=\[\] is empty"):
        report([], tmp_path)
