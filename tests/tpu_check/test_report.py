"""The page and its JSON."""

import json

import pytest

from tests.tpu_check.made_up import failed, row
from tpu_check import report
from tpu_check.limits import Waiver, verdicts


@pytest.fixture(autouse=True)
def versions(monkeypatch):
    """The TPU compiler need not be installed for the tests."""
    monkeypatch.setattr(report, "version", lambda name: {"jax": "0.1", "jaxlib": "0.2", "libtpu": "0.3"}[name])


def test_a_row():
    made = row({"ratio": 1.25})
    assert report.row_line(made, verdicts(made, ())) == [
        "8B b1",
        "v5e",
        "pallas_tpu",
        "902 MB",
        "1,000",
        "1,100",
        "998",
        "1.10",
        "9 MB",
        "1 kB",
        "0",
        "kept",
    ]


def test_a_row_says_what_is_a_lower_bound_and_which_layers():
    made = row(unknown=["fusion.1 (1)"], layers=4)
    label, _, _, _, _, hbm, bundles, ratio, *_, limits = report.row_line(made, ())
    assert (label, hbm, bundles, ratio) == ("8B b1, 4 of 32 layers", "≥ 1,100", "≥ 998", "≥ 1.10")
    assert limits == "none"


def test_the_page():
    rows = [row({"ratio": 1.05}), row({"ratio": 1.05}, chip="v5p"), failed("exit status 1: XlaRuntimeError: VMEM")]
    waiver = Waiver("decode_attention", "v5p", "ratio", 1.2, "one core works")
    page = report.markdown(rows, (waiver,))
    assert "Nothing here has been measured on a TPU" in page
    assert "Compiled with jax 0.1, jaxlib 0.2, libtpu 0.3." in page
    assert "| v5e | 1 | 0.82 | 17 | 128 | 1.50 |" in page
    table = page[page.index("## decode_attention") :].splitlines()
    assert len({line.count("|") for line in table[2:7]}) == 1
    assert table[4].endswith("| **ratio 1.1, at most 1.05** |")
    assert table[5].endswith("| ratio excepted |")
    assert table[6].endswith("| **failed** |")
    broken = page[page.index("## Limits broken") : page.index("## Limits not kept")]
    assert "- decode_attention/8B/b1 on v5e: ratio 1.1, at most 1.05\n" in broken
    assert "- decode_attention/8B/b1 on v6e did not compile: exit status 1: XlaRuntimeError: VMEM\n" in broken
    assert "v5p" not in broken
    assert "- decode_attention/8B/b1 on v5p: ratio 1.1, at most 1.2: one core works\n" in page


def test_compiler_options_are_told_for_the_chips_of_the_report():
    option = "`xla_tpu_control_large_2nd_minor_layout_for_x16=0` on tpu7x."
    assert option in report.markdown([row({"ratio": 1.25}, chip="tpu7x")], ())
    assert "Compiler options" not in report.markdown([row({"ratio": 1.25})], ())


def test_nothing_broken_is_said_too():
    assert "## Limits broken\n\nNone.\n" in report.markdown([row({"ratio": 1.25})], ())


def test_the_json():
    found = json.loads(json.dumps(report.document([row({"ratio": 1.05}), failed("no result after 900 s")], ())))
    assert found["kind"] == "static estimate"
    assert found["versions"]["libtpu"] == "0.3"
    assert found["chips"]["v5e"]["bandwidth"] == 820_000_000_000
    first, second = found["rows"]
    assert (first["figures"]["bundles"], first["limits"][0]["status"]) == (1_500_000, "broken")
    assert (second["figures"], second["error"]) == (None, "no result after 900 s")
