import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from recycled_jax import cli
from recycled_jax.flags import PolicyChoice, parse
from recycled_jax.policies import POLICIES
from tests.recycled_jax.parity import families


def command(
    *,
    model: str | None = None,
    policy: PolicyChoice = PolicyChoice(),  # noqa: B008 (frozen)
    max_new_tokens: int = 128,
    top_p: float | None = None,
    overwrite: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Does something.

    Args:
        max_new_tokens: How many.
    """


def values(*arguments: str) -> dict:
    return parse(command, arguments, prog="test")


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "config.yaml").write_text(text)
        return str(tmp_path / "config.yaml")

    return write


class TestValues:
    def test_defaults(self):
        knobs = {"k": 1024, "stride": 10, "refresh": "full", "pool": 7, "group_reduction": "max"}
        assert values() == {
            "model": None,
            "policy": PolicyChoice("recycled", knobs),
            "max_new_tokens": 128,
            "top_p": None,
            "overwrite": False,
            "dtype": "float32",
        }

    def test_flags(self):
        found = values("--max-new-tokens=5", "--top-p", "0.5", "--overwrite", "--dtype", "bfloat16", "--model", "x")
        assert (found["max_new_tokens"], found["top_p"], found["overwrite"]) == (5, 0.5, True)
        assert (found["dtype"], found["model"]) == ("bfloat16", "x")

    @pytest.mark.parametrize("spelling", [["--policy", "streaming"], ["--policy=streaming"]])
    def test_the_policy_decides_about_the_knobs(self, spelling):
        chosen = values(*spelling, "--policy.k", "9")["policy"]
        assert chosen.name == "streaming" and (chosen.knobs["k"], chosen.knobs["sinks"]) == (9, 4)

    def test_underscores_do_for_dashes(self):
        found = values("--max_new_tokens", "5", "--policy.group_reduction", "mean")
        assert found["max_new_tokens"] == 5 and found["policy"].knobs["group_reduction"] == "mean"

    def test_defaults_below_yaml_below_flags(self, config):
        path = config("policy: {name: recycled, k: 5, stride: 3}\nmax_new_tokens: 7\noverwrite: true\n")
        found = values("--config", path, "--policy.k", "6", "--no-overwrite")
        assert found["policy"].knobs | {"k": 6, "stride": 3, "pool": 7} == found["policy"].knobs
        assert found["max_new_tokens"] == 7 and found["overwrite"] is False

    def test_flags_win_wherever_they_stand(self, config):
        path = config("max_new_tokens: 7\n")
        assert values("--max-new-tokens", "9", "--config", path)["max_new_tokens"] == 9

    def test_yaml_names_the_policy(self, config):
        assert values("--config", config("policy: {name: streaming, sinks: 2}"))["policy"].knobs["sinks"] == 2


BAD = {
    "flag": (["--max-new-token", "3"], "--max-new-token is not a flag of this command; did you mean '--max-new"),
    "policy flag": (["--polcy", "full"], "did you mean '--policy'?"),
    "policy": (["--policy", "recyled"], "did you mean 'recycled'?"),
    "knob": (["--policy.strid", "3"], "did you mean 'stride'?"),
    "knob of another policy": (
        ["--policy", "full", "--policy.k", "3"],
        "policy.k is not a knob of 'full'; there is none",
    ),
    "int": (["--max-new-tokens", "many"], "--max-new-tokens is 'many', expected int"),
    "optional": (["--top-p", "much"], "--top-p is 'much', expected float | none"),
    "choice": (["--dtype", "int8"], "--dtype is 'int8', expected float32 | bfloat16"),
    "knob's type": (["--policy.stride", "x"], "--policy.stride is 'x', expected int"),
    "value": (["--policy.k"], "--policy.k: expected one argument"),
    "positional": (["extra"], "unrecognized arguments: extra"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        values(*arguments)


BAD_YAML = {
    "max_new_token: 3": "has the key 'max_new_token', which this command does not know; did you mean 'max_new_tokens'",
    "policy: {name: recycled, kk: 3}": "policy.kk is not a knob of 'recycled'",
    "policy: {name: recycle}": "policy='recycle' is unknown.*did you mean 'recycled'",
    "policy: recycled": "has policy: 'recycled', expected a mapping",
    "max_new_tokens: many": "--max-new-tokens is 'many', expected int",
    "- 1": "holds a list, expected a mapping",
    "a: [": "is not YAML",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_yaml(text, config):
    with pytest.raises(ValueError, match=BAD_YAML[text]):
        values("--config", config(text))


def test_yaml_that_is_not_utf8(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 7"):
        values("--config", str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "recycled: 'genrate' is not a command of recycled; did you mean 'generate'?"),
        (["--versoin"], "recycled: '--versoin' is not a flag of recycled; did you mean '--version'?"),
        (["generate", "--config", "nowhere.yaml"], "recycled: nowhere.yaml: No such file or directory"),
        (["convert"], "recycled: the following arguments are required: source, out"),
        (["convert", "nowhere", "out"], "recycled: path='nowhere' does not exist, expected the folder of a checkpoint"),
        (["generate", "--polcy", "x"], "recycled: --polcy is not a flag of this command; did you mean '--policy'?"),
        (["generate", "--prompt-file", "x", "--policy.k", "0"], "recycled: k=0 must be at least 1: the current token"),
        (["generate", "--prompt-file", "x", "--policy.stride", "0"], "recycled: stride=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and printed.err.count("\n") == 1
    assert printed.out == ""


def test_programming_errors_trace_back(monkeypatch):
    def broken(**_):
        raise TypeError("a bug")

    monkeypatch.setattr("recycled_jax.commands.policies.policies", lambda: broken())
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["policies"])


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "recycled 0.1.0\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_overview(arguments, capsys):
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "generate", "convert", "policies"))


def test_help_names_every_flag_with_default_and_meaning(capsys):
    assert cli.main(["generate", "--policy", "streaming", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--max-new-tokens MAX_NEW_TOKENS Most tokens to generate for a prompt. (type: int, default: 128)" in printed
    assert "--policy.sinks" in printed and "--policy.stride" not in printed


def test_help_of_convert_says_what_its_arguments_are(capsys):
    assert cli.main(["convert", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "out Folder to write, in the other format." in printed and "Args:" not in printed


def test_overview_does_not_wait_for_jax():
    code = "import sys; from recycled_jax.cli import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_a_reader_that_leaves_early_is_no_error():
    code = "import sys; from recycled_jax.cli import main; sys.exit(main(['--help']))"
    reading = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reading.wait()
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=reading.stdin, stderr=subprocess.PIPE, text=True, check=False
    )
    reading.stdin.close()
    assert (done.returncode, done.stderr) == (0, "")


def test_policies(capsys):
    assert cli.main(["policies"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{printed}" for name in POLICIES)
    assert cli.main(["policies", "recycled-dynamic"]) == 0
    printed = capsys.readouterr().out
    assert "query-check(stride=5, threshold=0.85, max_stride=1023)" in printed and "arXiv 2411.05787" in printed
    assert "--policy.max_stride: int | none = none" in printed
    assert "--policy.refresh: full | selection = full" in printed
    assert cli.main(["policies", "recyled"]) == 2
    assert "did you mean 'recycled'?" in capsys.readouterr().err


def test_the_page_of_policies_is_up_to_date(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "policies.md"
    assert cli.main(["policies", "--out", str(tmp_path / "policies.md")]) == 0
    assert (tmp_path / "policies.md").read_text() == page.read_text()


def test_convert(tmp_path):
    source = families.write_checkpoint(tmp_path / "source", "llama_2")
    assert cli.main(["convert", str(source), str(tmp_path / "orbax")]) == 0
    assert cli.main(["convert", str(source), str(tmp_path / "orbax")]) == 2
    assert cli.main(["convert", str(source), str(tmp_path / "orbax"), "--overwrite"]) == 0
    assert (Path(tmp_path) / "orbax" / "params").is_dir()
