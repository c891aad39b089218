"""The figures of the pages' tables are those of results files in the repository, which say where they come from."""

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
README, SPEED = ROOT / "README.md", DOCS / "speed.md"
RESULTS = sorted([*DOCS.glob("*.json"), *DOCS.glob("*.jsonl")])
# Scores alone are in the file; the page beside it names command, versions and machine.
TOLD_BY_THEIR_PAGE = ("continued_pretraining.json",)


def records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]


def table(page: Path, *columns: str) -> list[dict[str, str]]:
    """The rows, by their header, of the page's table that has these columns beside its first."""
    [(header, *rows)] = [found for found in tables(page) if found[0][1:] == [*columns]]
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
        for row in table(README, "single 4K", "multikey 4K", "single 8K", "multikey 8K")
        for column, cell in row.items()
        if column != "policy"
    }
    assert shown == {key: round(score) for key, score in scores.items()}


def speeds() -> dict[int, dict[str, Any]]:
    """Milliseconds by context and column. `full` and its floor are those measured around transformers: all figures of a
    context are of one process."""
    found = records(DOCS / "bench_cpu.jsonl")

    def record(length: int, **policy: Any) -> dict[str, Any]:
        [one] = [r for r in found if r["length"] == length and policy.items() <= r["policy"].items()]
        return one

    measured = {}
    for length in {record["length"] for record in found}:
        peer, ours = record(length, name="hf"), record(length, name="recycled", refresh="full")
        assert peer["command"] == ours["command"]
        assert (ours["policy"]["k"], ours["policy"]["stride"]) == (2048, 10)
        assert peer["decode_ms_per_step"]["p50"] == min(peer["peer"]["decode_ms_per_step"].values())
        measured[length] = {
            "transformers, fastest": peer["decode_ms_per_step"]["p50"],
            "`full`": peer["dense"]["decode_ms_per_step"]["p50"],
            "`recycled`, mean": ours["decode_ms_per_step"]["p50"],
            "its refresh": ours["full_step_ms"]["p50"],
            "its recycled step": ours["recycled_step_ms"]["p50"],
            "floor of `full`": peer["floor_ms"],
            "of `recycled`": ours["floor_ms"],
        }
    return measured


def shown(rows: list[dict[str, str]]) -> dict[int, dict[str, int]]:
    return {number(row["context"]): {key: number(row[key]) for key in row if key != "context"} for row in rows}


def test_speed():
    expected = {length: {key: round(ms) for key, ms in row.items()} for length, row in speeds().items()}
    assert shown(table(SPEED, *expected[4096])) == expected


def test_speed_in_the_readme():
    measured = {
        length: {
            "`full`": round(row["`full`"]),
            "`recycled`": round(row["`recycled`, mean"]),
            "transformers, fastest": round(row["transformers, fastest"]),
        }
        for length, row in speeds().items()
    }
    assert shown(table(README, *measured[4096])) == measured


def test_what_is_said_of_speed():
    found, longest = records(DOCS / "bench_cpu.jsonl"), speeds()[32768]
    [score_only] = [record for record in found if record["policy"].get("refresh") == "selection"]
    step, peer = score_only["decode_ms_per_step"]["p50"], longest["transformers, fastest"]
    drifts = sorted(round(100 * record["dense"]["drift"]) for record in found)
    said = " ".join(SPEED.read_text(encoding="utf-8").split())
    for sentence in (
        f"`full` is {peer / longest['`full`']:.1f} times as fast as transformers' fastest setting",
        f"`recycled` {peer / longest['`recycled`, mean']:.1f} times;",
        f"a mean step takes {step:.0f} ms, {peer / step:.1f} times.",
        f"differ by {100 * score_only['dense']['drift']:.0f} %,",
        f"at 16,384 by {drifts[-1]} %, elsewhere by at most {drifts[-3]} %.",
    ):
        assert sentence in said


def test_sizes_of_the_models():
    embedded, size = LlamaConfig.from_hf(EMBEDDED), sum(path.stat().st_size for path in EMBEDDED.glob("*.safetensors"))
    assert (
        f"{parameter_count(embedded) / 1e6:.1f} M parameters (a Qwen2 of 4 layers, {size / 1e6:.1f} MB)"
        in README.read_text()
    )
    config = parse_config(
        BenchConfig, ["--config", str(ROOT / "configs/eval/bench_cpu.yaml")], prog="eval", description=""
    )
    assert isinstance(config.model, RandomModel)
    random = f"random Llama of {parameter_count(config.model.random.config) / 1e6:.0f} M parameters"
    assert random in README.read_text() and random in SPEED.read_text()


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
    chains = {(row[0], row[1]): row[header.index("chain (100)")] for row in rows}
    falls = f"falls from {chains['full', '4096']} to {chains['recycled', '256']}, with 25 as its floor."
    assert falls in " ".join(README.read_text(encoding="utf-8").split())
    long = [record for record in records(DOCS / "bench_cpu.jsonl") if record["length"] == 32768]
    [ours] = [record for record in long if record["policy"].get("refresh") == "full"]
    [peer] = [record for record in long if record["policy"]["name"] == "hf"]
    steps = round(ours["decode_ms_per_step"]["p50"]), round(peer["dense"]["decode_ms_per_step"]["p50"])
    assert f"`recycled` takes {steps[0]} ms at 32,768 tokens and a full one {steps[1]} (" in " ".join(page.split())
