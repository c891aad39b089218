"""`recycled plan` with a compiler that is made up."""

import json

import pytest

from recycled_jax import cli
from recycled_jax.commands import plan as command
from recycled_jax.planning.programs import TooLarge
from recycled_jax.planning.slices import SLICES
from tests.recycled_jax.planning.made_up import SMALL, program


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Settings that were compiled, with a compiler that is there and content."""
    settings = []

    def compile_programs(setting):
        settings.append(setting)
        return [program("prefill"), program("decode loop")]

    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_hf()))
    monkeypatch.setattr(command, "compiler_version", lambda: "1.2.3")
    monkeypatch.setattr(command, "compile_programs", compile_programs)
    return settings


def run(tmp_path, *flags: str) -> int:
    return cli.main(["plan", "--model", str(tmp_path), "--context", "4096", *flags])


def test_a_plan_is_printed_and_written(asked, tmp_path, capsys):
    flags = ["--topology", "v5e-8", "--policy", "recycled", "--policy.k", "512", "--sweep", "[1024, 4096]"]
    assert run(tmp_path, *flags, "--out", str(tmp_path / "out")) == 0
    assert "mesh '{data: 2, tensor: 4}', batch 8, context 4,096" in capsys.readouterr().out
    (setting,) = asked
    assert (setting.config, setting.knobs["k"], setting.batch) == (SMALL, 512, 8)
    told = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [point["context"] for point in told["sweep"]] == [1024, 4096]
    assert (tmp_path / "out" / "plan.png").is_file()


def test_a_mesh_of_ones_own(asked, tmp_path):
    assert run(tmp_path, "--topology", "v5e-8", "--mesh", "{data: -1, tensor: 2, sequence: 2}") == 0
    assert (asked[0].mesh.data, asked[0].mesh.tensor, asked[0].mesh.sequence) == (2, 2, 2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology", "v9-8"], f"topology='v9-8' is not known; expected one of {', '.join(SLICES)}"),
        (["--topology", "v5e-8", "--mesh", "{tensor: 8}"], "tensor=8, expected a divisor of kv_heads=4"),
        (
            ["--topology", "v5e-8", "--mesh", "{data: 8}", "--batch", "6"],
            "data x fsdp = 8, expected a divisor of batch=6",
        ),
        (["--topology", "v5e-8", "--mesh", "{tenser: 2}"], "mesh has the axis 'tenser'; did you mean 'tensor'?"),
        (["--topology", "v5e-8", "--batch", "0"], "batch=0 must be at least 1"),
        (["--topology", "v5e-8", "--sweep", "[0]"], "sweep=0 must be at least 1"),
        (["--topology", "v5e-8", "--policy", "full"], "policy='full' has no recycled steps to plan"),
        (["--topology", "v5e-8", "--model", "lama-3.1-8b"], "nor a preset; did you mean 'llama-3.1-8b'?"),
        (
            ["--topology", "v5e-1", "--context", "100000000"],
            "context=100000000 with batch=8 does not fit v5e-1: it needs",
        ),
    ],
)
def test_bad_input_is_one_sentence(asked, tmp_path, capsys, flags, said):
    assert run(tmp_path, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("recycled: ")
    assert said in error


def test_what_the_compiler_refuses_is_told_and_ends_with_2(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "compile_programs", lambda setting: [TooLarge("prefill", 0, 0)])
    assert run(tmp_path, "--topology", "v5e-8") == 2
    told = capsys.readouterr()
    assert "floors per device" in told.out
    assert "the compiler refuses the prefill" in told.err


def test_without_a_compiler_the_sentence_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_hf()))
    monkeypatch.setattr("recycled_jax.planning.tpu_compiler.find_spec", lambda name: None)
    monkeypatch.setattr("recycled_jax.planning.tpu_compiler._beside", lambda: None)
    assert run(tmp_path, "--topology", "v5e-8") == 2
    assert "libtpu, the TPU compiler, is not installed; `pip install" in capsys.readouterr().err
