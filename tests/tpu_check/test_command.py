"""The command line and its exit status; what compiles is replaced."""

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest

from recycled_jax.planning.chips import CHIPS
from tests.tpu_check.made_up import FIGURES
from tpu_check import __main__ as command
from tpu_check import report
from tpu_check.jobs import Row


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Pairs of program and chip that were asked for; every one keeps its limits unless a test says otherwise."""
    asked = []

    def run(program, chip):
        asked.append((program.name, chip.name))
        return Row(program, chip, replace(FIGURES, hbm_us=1000.0, attention_us=1e6, tokens=10**6))

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(report, "version", lambda name: "1")
    return asked


def test_one_program_on_two_chips(compiled, capsys):
    assert command.main(["--only", "decode_attention/8B/b1", "--chips", "v5e,v6e"]) == 0
    assert compiled == [("decode_attention/8B/b1", "v5e"), ("decode_attention/8B/b1", "v6e")]
    out = capsys.readouterr().out
    assert "ok     decode_attention/8B/b1 v5e (pallas_tpu): 902 MB" in out
    assert "2 programs, 0 problems" in out


def test_an_operation_is_all_its_programs(compiled):
    assert command.main(["--only", "page_scores", "--chips", "[v5p]"]) == 0
    assert compiled == [("page_scores/pages_of_16/8B/b1", "v5p"), ("page_scores/pages_of_16/1B/b1", "v5p")]


def test_the_short_form_is_one_chip_and_has_every_limit_of_an_operation(compiled):
    jobs, out = command.plan(["--short"])
    assert out is None
    assert {chip.name for _, chip in jobs} == {"v5e"}
    limits = {(program.operation, limit) for program, _ in jobs for limit in program.limits}
    every, page = command.plan([])
    assert page == command.PAGE
    assert limits == {(program.operation, limit) for program, _ in every for limit in program.limits}
    assert {chip.name for _, chip in every} == set(CHIPS)


def test_names_are_unique():
    jobs, _ = command.plan([])
    names = [(program.name, chip.name) for program, chip in jobs]
    assert len(names) == len(set(names))


def test_page_and_json_are_written(tmp_path):
    assert command.main(["--only", "decode_attention", "--chips", "v5e", "--out", str(tmp_path / "page.md")]) == 0
    assert "## decode_attention" in (tmp_path / "page.md").read_text()
    assert len(json.loads((tmp_path / "page.json").read_text())["rows"]) == 6


def test_a_broken_limit_is_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda program, chip: Row(program, chip, replace(FIGURES, bundle_us=1300.0)))
    assert command.main(["--only", "decode_attention/8B/b1", "--chips", "v5e"]) == 1
    captured = capsys.readouterr()
    assert "BROKEN decode_attention/8B/b1 v5e" in captured.out
    assert "tpu_check: decode_attention/8B/b1 on v5e: ratio 1.3, at most 1.25" in captured.err


def test_a_crash_fails_its_row_and_the_rest_goes_on(monkeypatch, compiled, capsys):
    run = command.run

    def crash_on_v5p(program, chip):
        return Row(program, chip, None, "exit status -11: no message") if chip.name == "v5p" else run(program, chip)

    monkeypatch.setattr(command, "run", crash_on_v5p)
    assert command.main(["--only", "decode_attention/8B/b1"]) == 1
    assert [chip for _, chip in compiled] == ["v5e", "v6e", "tpu7x"]
    captured = capsys.readouterr()
    assert "FAILED decode_attention/8B/b1 v5p: exit status -11: no message" in captured.out
    assert "on v5p did not compile" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--chips", "v5ee"], "chips has 'v5ee', which is not known; did you mean 'v5e'?"),
        (["--chips", "[]"], "chips is empty"),
        (["--only", "decode_atention"], "only='decode_atention' is not a program; did you mean 'decode_attention'?"),
        (["--out", "no/such/folder/page.md"], "out='no/such/folder/page.md' is not a .md file in a folder that exists"),
        (["--out", "page.txt"], "out='page.txt' is not a .md file"),
        (["--chip", "v5e"], "'chip' is not an option; did you mean 'chips'?"),
    ],
)
def test_bad_input_is_exit_status_2(argv, message, compiled, capsys):
    assert command.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("tpu_check: ") and err.count("\n") == 1
    assert compiled == []


def test_no_compiler_is_exit_status_2(monkeypatch, capsys):
    def missing(name):
        if name == "libtpu":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(report, "version", missing)
    assert command.main(["--short"]) == 2
    assert "libtpu is not installed" in capsys.readouterr().err
