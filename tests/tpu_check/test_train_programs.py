"""Train steps for pods: their configs, what is read from compiled ones, and the limits; nothing is compiled here."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from recycled_jax.config import LlamaConfig
from tests.tpu_check.test_collectives import STEP
from tpu_check import hlo, pods, report, train_programs
from tpu_check.collectives import collectives
from tpu_check.pod_report import PodRow, document, markdown, problems
from tpu_check.train_programs import CONFIGS, PODS, PodFigures, attention_flops, matrix_flops, replicated, table_gathers
from train.__main__ import parse

POD = PODS["llama31_8b_recycled_v5e256"]
GB = 10**9
KEPT = PodFigures(
    arguments=2 * GB,
    temporaries=10 * GB,
    outputs=2 * GB,
    aliased=2 * GB,
    flops=1e12,
    matrix_flops=3e12,
    attention_flops=2e12,
    estimate_seconds=0.5,
    collectives={"all-gather": 3 * GB},
    largest=["all-gather 94.0 MB x 32 of mlp"],
    replicated=[],
    gathered=[],
    implementations=["causal_attention/pallas_tpu"],
    lower_seconds=1.0,
    compile_seconds=100.0,
)

SMALL = LlamaConfig(vocab=256, embed=8, mlp=16, layers=2, query_heads=4, kv_heads=2, head_dim=4)


def test_every_config_for_a_pod_is_checked():
    of_pods = {path.stem for path in CONFIGS.glob("*.yaml") if "\ndistributed:" in path.read_text()}
    assert of_pods == set(PODS)


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS.keys())
def test_a_config_fits_its_pod_and_its_model(pod):
    given = [
        "--model.start",
        "/models/it",
        "--corpus.sources",
        '[{path: "/data/*.jsonl"}]',
        "--evaluation.texts",
        "[a.txt]",
    ]
    config = parse(["--config", str(CONFIGS / f"{pod.name}.yaml"), *given])
    assert config.corpus is not None
    assert (config.model.start, config.corpus.sources[0].path) == ("/models/it", "/data/*.jsonl")
    mesh = config.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence == pod.devices
    for stage in config.stages:
        assert stage.batch % (mesh.data * mesh.fsdp * stage.accumulate) == 0
        assert stage.length % (128 * mesh.sequence) == 0
        assert config.corpus.streams >= stage.batch
    assert pod.model.kv_heads % (mesh.tensor * mesh.sequence) == 0
    assert pod.model.query_heads % (mesh.tensor * mesh.sequence) == 0
    assert pod.model.embed % mesh.fsdp == 0
    assert pod.model.vocab % mesh.tensor == pod.model.mlp % mesh.tensor == 0


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS.keys())
def test_a_config_has_what_the_paper_tells(pod):
    config = pod.config
    used, recycled, (stage,) = config.optimizer, config.model.recycled, config.stages
    assert (used.name, used.learning_rate, used.warmup, used.schedule) == ("adamw", 5e-6, 20, "linear")
    assert (used.weight_decay, stage.batch, stage.batch * stage.steps) == (0, 64, 120_000)
    assert recycled is not None and (recycled.k, recycled.stride, recycled.chunks) == (2048, 50, 1)
    assert recycled.prefix(stage.length) >= 8092


def test_a_gathered_table_is_found():
    found = collectives(hlo.parse(STEP))
    assert [exchange.name for exchange in table_gathers(found, SMALL)] == ["gather.3"]
    assert table_gathers(found, replace(SMALL, vocab=257)) == []


def test_a_replicated_matrix_is_found():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    whole, halves = (NamedSharding(mesh, PartitionSpec(axis)) for axis in (None, "fsdp"))
    smallest = SMALL.embed * SMALL.kv_heads * SMALL.head_dim
    sizes = {"matrix": smallest, "moment": smallest, "norm": smallest - 2}
    arrays = {name: jax.ShapeDtypeStruct((size,), np.float32) for name, size in sizes.items()}
    shardings = {"matrix": whole, "moment": halves, "norm": whole}
    assert list(replicated(SMALL, arrays, shardings)) == ["['matrix'][64]"]
    assert list(replicated(SMALL, arrays, shardings | {"matrix": halves})) == []


def test_figures_of_a_compiled_step():
    memory = SimpleNamespace(
        argument_size_in_bytes=7, temp_size_in_bytes=20, output_size_in_bytes=8, alias_size_in_bytes=6
    )
    pod = replace(POD, model=SMALL)
    cost = {"flops": 5.0, "optimal_seconds": 2.0}
    found = train_programs.figures(pod, pod.config, STEP, memory, cost, ["w[64]"], (1.0, 3.0))
    assert found.memory == 7 + 20 + 8 - 6
    assert (found.flops, found.estimate_seconds, found.replicated) == (5.0, 2.0, ["w[64]"])
    assert found.gathered == ["all-gather 0.0 MB x 1 of jit(step)/logits"]
    assert found.largest[0] == found.gathered[0] and len(found.largest) == 7
    assert (found.lower_seconds, found.compile_seconds) == (1.0, 3.0)
    assert found.attention_flops == attention_flops(SMALL, pod.config) / 256
    assert found.matrix_flops == matrix_flops(SMALL, pod.config) / 256


def test_operations_are_counted_by_hand():
    config, tokens = POD.config, 64 * 8192
    layer = 4096 * (2 * 32 * 128 + 2 * 8 * 128 + 3 * 14_336)
    assert matrix_flops(POD.model, config) == 2 * tokens * (4 * 32 * layer + 3 * 128_256 * 4096)
    assert matrix_flops(POD.model, replace(config, remat="dots")) == 6 * tokens * (32 * layer + 128_256 * 4096)
    one = (
        64 * 32 * 32 * 128 * 8192**2
    )  # a product: rows x layers x heads x head_dim x tokens², two operations, half of it
    assert attention_flops(POD.model, config) == 11 * one
    assert attention_flops(POD.model, replace(config, remat="none")) == 9 * one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temporaries": 16 * GB}, "llama31_8b_recycled_v5e256 takes 18 GB of a device, at most 17.2 GB"),
        ({"replicated": ["[0]['moment'][64]"]}, "has [0]['moment'][64] whole on every device"),
        (
            {"gathered": ["all-gather 1050.7 MB x 1 of logits"]},
            "gathers a table as large as the embedding: all-gather 1",
        ),
    ],
)
def test_each_limit_can_be_broken(changes, message):
    assert problems(PodRow(POD, KEPT)) == []
    (problem,) = problems(PodRow(POD, replace(KEPT, **changes)))
    assert message in problem


def test_results_in_place_of_arguments_count_once():
    in_place = replace(KEPT, arguments=4 * GB, outputs=4 * GB, aliased=4 * GB)
    assert in_place.memory == 14 * GB
    assert problems(PodRow(POD, in_place)) == []
    assert problems(PodRow(POD, replace(in_place, aliased=0)))


def test_the_page_tells_all_rows():
    versions = {"jax": "1", "libtpu": "2"}
    rows = [PodRow(POD, KEPT), PodRow(PODS["qwen2_7b_recycled_v6e64"], None, "exit status 1: out of memory")]
    page = markdown(rows, versions)
    assert "static estimate" in page and "jax 1, libtpu 2" in page
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "| `v5e:16x16` | fsdp 32 × tensor 4 × sequence 2 | 64 × 8,192 | 12 GB | 70% |" in lines[2]
    assert "| 0.5 | 3 GB | 100 | kept |" in lines[2]
    assert "| not known | 3 GB |" in markdown([PodRow(POD, replace(KEPT, estimate_seconds=-28.9))], versions)
    assert lines[3].endswith("**failed** |")
    assert "- qwen2_7b_recycled_v6e64 did not compile for v6e:8x8: exit status 1: out of memory" in page
    written = document(rows, versions)
    assert [len(row["problems"]) for row in json.loads(json.dumps(written))["rows"]] == [0, 1]
    assert not math.isnan(written["rows"][0]["figures"]["flops"])


@pytest.fixture
def child(monkeypatch):
    """Modules and arguments of the processes started; each one answers with `answer`."""
    calls = SimpleNamespace(started=[], answer=asdict(KEPT))

    def alone(module, arguments, out, timeout):
        calls.started.append((module, arguments))
        return calls.answer

    monkeypatch.setattr(pods, "alone", alone)
    monkeypatch.setattr(report, "version", lambda name: "1")
    return calls


def test_one_pod_and_its_page(child, tmp_path, capsys):
    assert pods.main(["--only", POD.name, "--out", str(tmp_path / "page.md")]) == 0
    assert child.started == [("tpu_check.train_programs", [POD.name])]
    assert "1 pods, 0 problems" in capsys.readouterr().out
    assert POD.name in Path(tmp_path / "page.md").read_text()
    assert json.loads((tmp_path / "page.json").read_text())["rows"][0]["figures"] == asdict(KEPT)


def test_everything_is_every_pod_on_the_page():
    assert pods.plan([]) == (list(PODS.values()), pods.PAGE)
    assert pods.plan(["--only", POD.name]) == ([POD], None)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (asdict(replace(KEPT, replicated=["x[9]"])), "has x[9] whole on every device"),
        ("exit status 1: no", "did not compile for v5e:16x16: exit status 1: no"),
        (None, "no result after"),
    ],
)
def test_a_problem_is_exit_status_1(child, capsys, answer, message):
    child.answer = answer
    assert pods.main(["--only", POD.name]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--only", "llama31_8b_recycled_v5e25"],
            "is not a config for a pod; did you mean 'llama31_8b_recycled_v5e256'?",
        ),
        (["--out", "no/such/folder/page.md"], "is not a .md file in a folder that exists"),
        (["--onyl", "x"], "onyl"),
    ],
)
def test_bad_input_is_exit_status_2(child, capsys, argv, message):
    assert pods.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("tpu_check: ") and err.count("\n") == 1
    assert child.started == []
