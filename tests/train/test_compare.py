"""The table of runs, and the page that shows one."""

import json
from pathlib import Path

import pytest

from train.compare import compare, ends, markdown

DOCS = Path(__file__).parents[2] / "docs"


def write(folder: Path, *lines: dict) -> str:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_scores_before_and_after(tmp_path, capsys):
    before, middle = {"step": 0, "perplexity_full": 9.0}, {"step": 5, "perplexity_full": 8.0}
    runs = {
        "causal": [
            write(tmp_path / "a", before, {"step": 1, "loss": 3.0}, middle, {"step": 10, "perplexity_full": 6.0}),
            write(tmp_path / "b", before, middle, {"step": 10, "perplexity_full": 7.0}),
        ],
        "recycled": [write(tmp_path / "c", before, {"step": 10, "perplexity_full": 5.5})],
    }
    assert ends(runs["causal"][0]) == {
        "steps": 10,
        "before": {"perplexity_full": 9.0},
        "after": {"perplexity_full": 6.0},
    }
    compare(runs, out=tmp_path / "scores.json")
    table = capsys.readouterr().out
    assert table.splitlines()[2:] == [
        "| before | 9.00 |",
        "| causal (2) | 6.50 (6.00–7.00) |",
        "| recycled (1) | 5.50 |",
    ]
    compare(scores=tmp_path / "scores.json")
    assert capsys.readouterr().out == table


def test_runs_that_cannot_be_compared(tmp_path):
    done, stopped = (write(tmp_path / str(step), {"step": step, "perplexity_full": 6.0}) for step in (10, 5))
    with pytest.raises(ValueError, match="end at different steps"):
        compare({"causal": [done, stopped]})
    with pytest.raises(ValueError, match="expected at least one run for each"):
        compare({"causal": [done], "recycled": []})


def test_a_run_without_scores(tmp_path):
    with pytest.raises(ValueError, match="has no scores"):
        ends(write(tmp_path / "a", {"step": 1, "loss": 3.0}))


def test_the_page_shows_the_table_of_its_scores():
    page = (DOCS / "continued_pretraining.md").read_text(encoding="utf-8")
    assert markdown(json.loads((DOCS / "continued_pretraining.json").read_text())) in page
