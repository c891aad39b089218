"""The figures of README's tables are those of results files in the repository, which say where they come from."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from eval.bench import BenchConfig, RandomModel
from recycled_jax.commands.loading import EMBEDDED
from recycled_jax.config import LlamaConfig
from recycled_jax.config_flags import parse_config
from recycled_jax.weights import parameter_count
from tests.docs.pages import ROOT, blocks, tables

DOCS = ROOT / "docs"
README = ROOT / "README.md"
RESULTS = sorted([*DOCS.glob("*.json"), *DOCS.glob("*.jsonl")])
# Scores alone are in the file; the page beside it names command, versions and machine.
TOLD_BY_THEIR_PAGE = ("continued_pretraining.json",)


def records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]


def table(first: str) -> list[dict[str, str]]:
    """The rows of README's table whose second column begins with `first`, by their header."""
    [(header, *rows)] = [found for found in tables(README) if found[0][1].startswith(first)]
    return [dict(zip(header, row, strict=True)) for row in rows]


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_retrieval():
    scores = {
        (cell["policy"], f"{cell['task']} {cell['length'] // 1024}K"): cell["score"]
        for length in (4096, 8192)
        for cell in records(DOCS / f"retrieval_{length}.json")[0]["cells"]
    }
    shown = {
        (row["policy"].strip("`"), column): number(cell)
        for row in table("single 4K")
        for column, cell in row.items()
        if column != "policy"
    }
    assert shown == {key: round(score) for key, score in scores.items()}


def test_speed():
    """`full` and its floor are those measured around transformers: all of a row is of one process."""
    found = records(DOCS / "bench_cpu.jsonl")

    def record(length: int, **policy: Any) -> dict[str, Any]:
        [one] = [r for r in found if r["length"] == length and policy.items() <= r["policy"].items()]
        return one

    for row in table("transformers"):
        peer = record(number(row["context"]), name="hf")
        ours = record(number(row["context"]), name="recycled", refresh="full")
        assert peer["command"] == ours["command"]
        assert (ours["policy"]["k"], ours["policy"]["stride"]) == (2048, 10)
        assert peer["decode_ms_per_step"]["p50"] == min(peer["peer"]["decode_ms_per_step"].values())
        expected = {
            "transformers, fastest": peer["decode_ms_per_step"]["p50"],
            "`full`": peer["dense"]["decode_ms_per_step"]["p50"],
            "`recycled`, mean": ours["decode_ms_per_step"]["p50"],
            "its refresh": ours["full_step_ms"]["p50"],
            "its recycled step": ours["recycled_step_ms"]["p50"],
            "floor of `full`": peer["floor_ms"],
            "of `recycled`": ours["floor_ms"],
        }
        shown = {column: number(cell) for column, cell in row.items() if column != "context"}
        assert shown == {column: round(value) for column, value in expected.items()}
    assert {number(row["context"]) for row in table("transformers")} == {record["length"] for record in found}


def test_sizes_of_the_models():
    said = README.read_text(encoding="utf-8")
    embedded, size = LlamaConfig.from_hf(EMBEDDED), sum(path.stat().st_size for path in EMBEDDED.glob("*.safetensors"))
    assert f"{parameter_count(embedded) / 1e6:.1f} M parameters (a Qwen2 of 4 layers, {size / 1e6:.1f} MB)" in said
    config = parse_config(
        BenchConfig, ["--config", str(ROOT / "configs/eval/bench_cpu.yaml")], prog="eval", description=""
    )
    assert isinstance(config.model, RandomModel)
    assert f"a random Llama of {parameter_count(config.model.random.config) / 1e6:.0f} M parameters" in said


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_results_file_says_where_it_comes_from(path):
    """Command, versions and the kind of machine; a static estimate, which no machine decides, its versions."""
    if path.name in TOLD_BY_THEIR_PAGE:
        page = path.with_suffix(".md")
        assert any(f"--out docs/{path.name}" in code.text for code in blocks(page, "sh"))
        assert "CPU cores, JAX 0.12" in page.read_text(encoding="utf-8")
        return
    first = records(path)[0]
    assert first["versions"]["jax"] and first["versions"]["jaxlib"]
    if first.get("kind") != "static estimate":
        assert shlex.split(first["command"])[0] == "python"
        assert first["device"]["kind"] and first["device"]["machine"] and first.get("date")


def test_every_line_of_speed_is_from_one_kind_of_machine():
    found = records(DOCS / "bench_cpu.jsonl")
    assert len({json.dumps([record["versions"], record["device"]["kind"], record["model"]]) for record in found}) == 1


def test_what_is_said_of_the_papers():
    """Our column of docs/reproducing_the_papers.md, from the table of docs/policies_quality.md."""
    [(header, *rows)] = [found for found in tables(DOCS / "policies_quality.md") if len(found) > 20]

    def over_budgets(policy: str, task: str) -> str:
        [column] = [place for place, cell in enumerate(header) if cell.startswith(task)]
        values = [int(row[column]) for row in rows if row[0] == policy]
        assert len(values) == 3
        return f"{min(values)} to {max(values)}" if min(values) < max(values) else str(values[0])

    chain, single = (lambda policy: over_budgets(policy, "chain")), (lambda policy: over_budgets(policy, "single"))
    page = (DOCS / "reproducing_the_papers.md").read_text(encoding="utf-8")
    for said in (
        f"`single`: `recycled` {single('recycled')}, `streaming` {single('streaming')} |",
        f"`chain`: stride 2 {chain('recycled, stride 2')}, one selection {chain('snapkv, window 1')}; "
        f"at stride 8 {chain('recycled')} |",
        f"`chain`: {chain('recycled, score-only')} against {chain('recycled')}; perplexity within",
        f"`single`: {single('tidal')} |",
        f"`chain`: {chain('less-is-more')} against {chain('tidal')} |",
        f"`single`: `h2o` {single('h2o')}, `tova` {single('tova')} |",
        f"`recycled-dynamic` gets {chain('recycled-dynamic')} on `chain`",
    ):
        assert said in page
    long = [record for record in records(DOCS / "bench_cpu.jsonl") if record["length"] == 32768]
    [ours] = [record for record in long if record["policy"].get("refresh") == "full"]
    [peer] = [record for record in long if record["policy"]["name"] == "hf"]
    steps = round(ours["decode_ms_per_step"]["p50"]), round(peer["dense"]["decode_ms_per_step"]["p50"])
    assert f"`recycled` takes {steps[0]} ms at 32,768 tokens and a full one {steps[1]} (" in " ".join(page.split())
