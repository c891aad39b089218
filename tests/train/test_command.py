"""`python -m train`: what it accepts, and the one line it answers bad input with."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import train.__main__ as command
from tests.train import tiny_run
from train.config import Data, Optimizer, TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


@pytest.fixture
def fails(capsys):
    """Runs a command line that must fail, and gives its one line."""

    def run(*arguments: str) -> str:
        assert command.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("train: ") and err.endswith("\n") and err.count("\n") == 1
        return err

    return run


def test_yaml_gives_the_config_and_flags_override_it(config):
    asked = dataclasses.replace(
        TrainConfig(), seed=3, optimizer=Optimizer(name="adamw"), data=Data(texts=("a.txt", "b.txt"), digits=(2, 3))
    )
    path = config(yaml.safe_dump(json.loads(_json(asked))))
    assert command.parse(["--config", path]) == asked
    expected = dataclasses.replace(asked, seed=4, optimizer=Optimizer(name="adamw", warmup=7), data=Data(digits=(2, 3)))
    assert command.parse(["--config", path, "--seed", "4", "--optimizer.warmup=7", "--data.texts", "[]"]) == expected


def _json(config: TrainConfig) -> str:
    return json.dumps(dataclasses.asdict(config))


def test_shipped_configs_are_valid():
    for path in (ROOT / "configs" / "train").glob("*.yaml"):
        assert command.parse(["--config", str(path)]).steps > 0


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    assert command.main([]) == 130
    said = "train: interrupted; the same command goes on from the newest checkpoint\n"
    assert capsys.readouterr() == ("", said)


def test_a_config_that_is_not_there(capsys):
    assert command.main(["--config", "nowhere.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("train: config='") and said.endswith("nowhere.yaml' does not exist\n")


def test_no_arguments_is_the_default():
    assert command.parse([]) == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeed: 3", "'seeed' is not a setting; did you mean 'seed'?"),
        ("optimizer: {wramup: 3}", "'optimizer.wramup' is not a setting; did you mean 'optimizer.warmup'?"),
        ("stages: [{length: 8, batch: 8, stepss: 3}]", "'stepss' is not a setting; did you mean 'steps'?"),
        ("stages: [{length: 8, batch: 8, steps: 0}]", "stages: steps=0 must be at least 1"),
        ("stages: []", "stages=[] must have at least one stage"),
        ("seed: many", "\"seed\": Expected a <class 'int'>. Got value: many"),
        ("optimizer: {name: sgd}", "\"optimizer.name\": Expected a typing.Literal['adamw', 'muon']. Got value: sgd"),
        ("stages: [", "Problems parsing config"),
    ],
)
def test_bad_yaml(config, fails, text, message):
    assert message in fails("--config", config(text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeed", "3"], "'seeed' is not a setting; did you mean 'seed'?"),
        (["--optimizer.wramup=3"], "'optimizer.wramup' is not a setting; did you mean 'optimizer.warmup'?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--data.texts", "[nowhere.txt]"], "No such file or directory: 'nowhere.txt'"),
        (["--mesh.data", "3"], "needs a multiple of 3 devices, there are 8"),
        (["--data.digits", "[7, 5]"], "data.digits=[7, 5] must be two numbers of digits, 1 <= low <= high <= 18"),
        (["--data.text_share", "2"], "data.text_share=2.0 must be between 0 and 1"),
        (["--optimizer.learning_rate", "0"], "optimizer.learning_rate=0.0 must be above 0"),
        (["--save_every", "0"], "save_every=0 must be at least 1"),
        (["stray"], "stray"),
    ],
)
def test_bad_flags(fails, arguments, message):
    assert message in fails(*arguments)


def test_config_that_is_not_utf8(tmp_path, fails):
    (tmp_path / "run.yaml").write_bytes(b"out: caf\xe9")
    assert "utf-8" in fails("--config", str(tmp_path / "run.yaml"))


def test_out_that_cannot_be_made(tmp_path, fails):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails(
        "--out", str(tmp_path / "file" / "run"), "--stages", "[{length: 8, batch: 8, steps: 1}]"
    )


def test_texts_that_are_not_utf8(tmp_path, fails):
    (tmp_path / "novel.txt").write_bytes(b"caf\xe9")
    assert "novel.txt' is not UTF-8 text" in fails("--data.texts", f"[{tmp_path}/novel.txt]")


def test_exit_status_of_the_program(config):
    done = subprocess.run(
        [sys.executable, "-m", "train", "--config", config("seeed: 3")], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "train: 'seeed' is not a setting; did you mean 'seed'?\n"


def test_a_stop_is_a_success(config, tmp_path, capsys):
    asked = tiny_run.config(tmp_path)
    with tiny_run.at_step(1, tiny_run.send_sigterm):
        assert command.main(["--config", config(_json(asked))]) == 0
    out = capsys.readouterr().out
    assert "stopped at step 1 of 9; the same command goes on from there" in out and "exported" not in out
    assert command.main(["--config", config(_json(asked))]) == 0
    assert capsys.readouterr().out.endswith(f"exported {asked.out}/hf\n")
