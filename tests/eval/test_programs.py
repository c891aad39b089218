"""The two evaluation programs, on a tiny random model."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval import policies as quality
from eval.kernels import kernels
from eval.retrieval import evaluate, table
from tests.recycled_jax.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny"))


def test_retrieval_scores_every_policy_on_the_same_examples(model, tmp_path, capsys):
    out = tmp_path / "out.json"
    evaluate(out, lengths=[300], tasks=["single"], policies=["full", "streaming"], examples=3, batch=2, model=model)
    result = json.loads(out.read_text())
    assert [(c["policy"], c["task"], c["length"], c["n"]) for c in result["cells"]] == [
        ("full", "single", 300, 3),
        ("streaming", "single", 300, 3),
    ]
    assert all(c["interval"][0] <= c["score"] <= c["interval"][1] for c in result["cells"])
    assert {"jax", "jaxlib", "flax"} <= result["versions"].keys() and result["device"]["kind"] == "cpu"
    assert "| full | 0 |" in capsys.readouterr().out  # a random model knows nothing


def test_every_policy_answers_the_same_questions_and_an_interrupted_run_goes_on(model, tmp_path, capsys):
    out, book = tmp_path / "out.jsonl", tmp_path / "novel.txt"
    book.write_text("It was a dark night and nobody came. " * 40)
    tasks = ["single", "novel", "mass"]
    options = {"length": 320, "budgets": [16], "tasks": tasks, "examples": 3, "batch": 2, "model": model}
    quality.evaluate(out, book, policies=["full", "recycled"], **options)
    assert "| recycled | 16 | 0 |" in capsys.readouterr().out  # a random model knows nothing
    whole = out.read_text()
    results = [json.loads(line) for line in whole.splitlines()][1:]
    assert len(results) == (2 * 3 - 1) * 2  # policies and tasks, but for the mass that full does not have; batches
    for line in results:
        for figure in ("read", "mass"):
            for value in line.get(figure, []):
                assert value == 1 if line["policy"] == "full" else 0 < value < 0.5
    # no two are alike, nor policies equal
    assert len({value for line in results for value in line.get("nll", [])}) == 2 * 3

    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:-1]) + lines[-1][:20])
    quality.evaluate(out, book, policies=["full", "recycled"], **options)
    assert out.read_text() == whole
    with pytest.raises(ValueError, match=r"holds results of .*; expected"):
        quality.evaluate(out, book, policies=["full"], **options | {"length": 400})
    with pytest.raises(ValueError, match="policies has 'ful'; expected some of full, top-k"):
        quality.evaluate(out, book, policies=["ful"], **options)


def test_table_of_policies_by_hand():
    results = [
        {"task": "single", "policy": "recycled", "k": 4, "first": 0, "score": [0.0, 0.0], "read": [0.25, 0.35]},
        {"task": "single", "policy": "full", "k": 8, "first": 0, "score": [1.0, 0.5], "read": [1.0, None]},
        {"task": "single", "policy": "full", "k": 8, "first": 2, "score": [0.0], "read": [1.0]},
        {"task": "novel", "policy": "full", "k": 8, "first": 0, "nll": [1.0], "read": [1.0]},
        {"task": "mass", "policy": "recycled", "k": 4, "first": 0, "mass": [0.6, 0.7]},
    ]
    assert quality.markdown(results).splitlines() == [
        "| policy | k | single (2) | perplexity (1) | mass of selection | bytes read |",
        "|---|---|---|---|---|---|",
        "| full | 8 | 50 | 2.7 |  | 100 % |",
        "| recycled | 4 | 0 |  | 65 % | 30 % |",
    ]


def test_perplexity_by_distance_by_hand():
    far = [0.0] * 7 + [np.log(2)]
    results = [
        {"task": "novel", "policy": "full", "k": 8, "first": 0, "nll_by_stretch": [[1.0] * 8]},
        {"task": "novel", "policy": "snapkv", "k": 4, "first": 0, "nll_by_stretch": [(np.ones(8) + far).tolist()]},
        {"task": "novel", "policy": "snapkv", "k": 4, "first": 1, "nll_by_stretch": [[9.0] * 8]},  # full was not asked
    ]
    assert quality.by_distance(results).splitlines() == [
        "| policy | k | to 32 | to 64 | to 96 | to 128 | to 160 | to 192 | to 224 | to 256 |",
        "|---" * 10 + "|",
        "| snapkv | 4 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 2.000 |",
    ]


def test_the_page_shows_the_tables_of_its_results():
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "policies_quality.md").read_text()
    for file in ("policies_quality.jsonl", "long_heads_64k.jsonl"):
        results = [json.loads(line) for line in (docs / file).read_text().splitlines()[1:]]
        assert quality.markdown(results) in page
        assert {line["policy"] for line in results} <= quality.CANDIDATES.keys()


def test_table_by_hand():
    cells = [
        {"policy": "full", "task": "single", "length": 8, "score": 100.0},
        {"policy": "full", "task": "chain", "length": 8, "score": 49.6},
        {"policy": "none", "task": "single", "length": 8, "score": 0.0},
    ]
    assert table(cells).splitlines() == [
        "| policy | single 8 | chain 8 |",
        "|---|---|---|",
        "| full | 100 | 50 |",
        "| none | 0 |  |",
    ]


def test_kernels_put_a_copy_beside_every_operation(tmp_path):
    out = tmp_path / "out.json"
    kernels(out, tokens=[512], kv_heads=2, group=2, head_dim=16, k=32, dtype="float32", calls=2)
    result = json.loads(out.read_text())
    cells = {cell["operation"]: cell for cell in result["cells"]}
    assert cells["decode_attention"]["bytes"] == 2 * 512 * 2 * 16 * 4  # k and v of 512 tokens, 2 heads of 16 floats
    assert cells["token_scores"]["bytes"] == 512 * 2 * 16 * 4 + 512 * 2 * 4  # k, and a score per head
    assert cells["selection_attention"]["bytes"] == 2 * 32 * 2 * 16 * 4
    assert all(
        cell["share_of_copy"] == pytest.approx(cell["bytes_per_second"] / result["copy_bytes_per_second"])
        for cell in cells.values()
    )
