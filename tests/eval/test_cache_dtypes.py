"""What rounding costs: its measures by hand, and one small run."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval import cache_dtypes
from eval.cache_dtypes import KINDS, POLICIES, compare, error, table


def test_measures_by_hand():
    exact = np.log([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])
    ours = exact + np.array([[0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    found = error(ours, exact)
    assert (found["max"], found["mean"], found["same_token"]) == (3.0, 0.5, 0.5)
    shares = np.array([1, np.exp(3), 2]) / (3 + np.exp(3))  # of the second prompt
    expected = sum(p * np.log(p / q) for p, q in zip([0.25, 0.25, 0.5], shares, strict=True)) / 2
    assert found["kl"] == pytest.approx(expected)
    unmoved = error(exact, exact)
    assert unmoved == {"max": 0.0, "mean": 0.0, "kl": 0.0, "same_token": 1.0}


def test_every_kind_answers_the_same_questions(tmp_path, capsys, monkeypatch):
    kinds = KINDS[:2]  # half of the programs to compile
    monkeypatch.setattr(cache_dtypes, "KINDS", kinds)
    monkeypatch.setattr(cache_dtypes, "POLICIES", {"full": POLICIES["full"]})
    compare(tmp_path / "out.json", length=128, tasks=["single"], examples=2, batch=2)
    told = json.loads((tmp_path / "out.json").read_text())
    assert [(kind["dtype"], kind["cache"]) for kind in told["kinds"]] == [("float32", "float32"), ("float32", "int8")]
    exact, rounded = told["kinds"]
    assert exact["logits"]["max"] == 0.0 < rounded["logits"]["max"] < told["logits_max"]
    assert {kind["scores"]["full"]["single"] for kind in told["kinds"]} <= {0.0, 50.0, 100.0}
    assert capsys.readouterr().out.count("\n") == 2 + len(kinds)


def test_the_page_has_the_table_of_the_file():
    docs = Path(__file__).parents[2] / "docs"
    told = json.loads((docs / "cache_dtypes.json").read_text())
    assert table(told["kinds"]) in (docs / "int8_cache.md").read_text()
