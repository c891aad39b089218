import csv

import numpy as np
import pytest

from recycled_jax import cli
from recycled_jax.checkpoint import load_model
from recycled_jax.commands import demo as command
from recycled_jax.commands.loading import Checkpoint
from recycled_jax.commands.measure import BLOCK, BLOCKS, Measurement, measure
from recycled_jax.generate import generate, read
from recycled_jax.policies import make_policy
from tests.recycled_jax import tiny

CONTEXT = 600  # bytes, and the tiny model's tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # long enough for a quarter of the context and for the context, not for twice as much
    return tiny.save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", max_length=700)


@pytest.fixture
def run(model, tmp_path):
    """Runs `recycled demo` with further arguments; returns the exit status."""

    def run(*arguments: str) -> int:
        fixed = ["--model", str(model), "--context", str(CONTEXT), "--examples", "2", "--out", str(tmp_path / "out")]
        return cli.main(["demo", *fixed, *arguments])

    return run


@pytest.fixture
def asked(monkeypatch, model):
    """Replaces decoding: `full` answers correctly, the others with nonsense. Collects the prompts."""
    text = Checkpoint.find(str(model)).text
    prompts: list[str] = []

    def answer(model, params, rows, *, policy):
        documents = [text.decode(row[1:]) for row in rows]
        prompts.extend(documents)
        tokens = []
        for document in documents:
            _, _, asked = document.rpartition("?")
            value = document.partition(asked.strip())[2].partition(".")[0] if "?" in document else ""
            reply = value if policy.name == "full" else "42"
            tokens.append([*text.encode(reply)[1:], tiny.EOS, 5, 6])
        refreshes = {"full": 40.0, "recycled": 5.0, "recycled-dynamic": 2.0, "streaming": 0.0}[policy.name]
        return Measurement(tokens, 0.01 * (1 + refreshes), 1000.0 * (1 + refreshes), 41000.0, 40, refreshes)

    monkeypatch.setattr(command, "read", lambda model, params, rows, *, max_new_tokens: rows)
    monkeypatch.setattr(command, "measure", answer)
    return prompts


def read_csv(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_measure(model):
    network, params = load_model(model)
    prompts = [list(range(1, 60)), list(range(60, 90))]
    policy = make_policy("recycled", k=16, stride=4)
    prefilled = read(network, params, prompts, max_new_tokens=BLOCK * BLOCKS + 1)
    found = measure(network, params, prefilled, policy=policy)
    expected = generate(network, params, prefilled, policy=policy, max_new_tokens=BLOCK * BLOCKS + 1)
    for row in range(2):  # the same tokens, but that nothing stops
        assert len(found.tokens[row]) == BLOCK * BLOCKS + 1
        assert found.tokens[row][: len(expected.tokens[row])] == expected.tokens[row]
    assert (found.steps, found.refreshes, found.effective_stride) == (64, 16, 4)
    assert 0 < found.kv_bytes < found.dense_kv_bytes
    assert 0 < found.step_seconds < 1


def test_end_to_end(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "POLICIES", {name: command.POLICIES[name] for name in command.COMPARED})
    assert run() == 0
    rows = read_csv(tmp_path / "out" / "demo.csv")
    assert [row["policy"] for row in rows] == ["full", "recycled k=256 stride=8"]
    assert float(rows[0]["speed_ratio_to_full"]) == 1 and float(rows[0]["effective_stride"]) == 1
    assert float(rows[1]["effective_stride"]) == 8
    # two layers of two kv heads of eight channels, keys and values, four bytes each, for some 600 tokens
    assert int(rows[0]["kv_bytes_per_token"]) == pytest.approx(2 * 2 * 8 * 2 * 4 * 600, rel=0.1)
    assert int(rows[1]["kv_bytes_per_token"]) < 0.7 * int(rows[0]["kv_bytes_per_token"])
    speeds = read_csv(tmp_path / "out" / "demo_speed.csv")
    assert [(row["policy"], row["context"]) for row in speeds] == [
        (name, str(length)) for length in (150, 600) for name in command.COMPARED
    ]
    assert all(float(row["ms_per_token"]) > 0 for row in speeds)
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Asked at its end: What is the magic number for" in printed and "demo_speed.csv" in printed


def test_table_and_answers(run, asked, tmp_path, capsys):
    assert run("--examples", "9") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == "policy single multikey tokens/s vs full KV read/token of dense stride".split()
    assert printed[1].split() == "full 100% 100% 19.5 1.00x 0.041 MB 100.0% 1.0".split()
    assert printed[2].split()[3:] == "0% 0% 133.3 6.83x 0.006 MB 14.6% 8.0".split()
    assert printed[3].split()[3:] == "0% 0% 266.7 13.67x 0.003 MB 7.3% 20.0".split()
    assert printed[4].split()[2:] == "0% 0% 800.0 41.00x 0.001 MB 2.4% never".split()
    answers = [line.split() for line in printed if line.startswith("  ")]
    assert answers[0][:2] == ["full", "right"] and answers[3] == ["streaming", "k=256", "wrong", "42"]
    rows = read_csv(tmp_path / "out" / "demo.csv")
    assert [float(row["accuracy_multikey"]) for row in rows] == [1, 0, 0, 0]


def test_haystack_and_seed(run, asked, tmp_path):
    (tmp_path / "novel.txt").write_text("Call me Ishmael. " * 50, encoding="utf-8")
    assert run("--haystack", str(tmp_path / "novel.txt")) == 0
    own = [prompt for prompt in asked if "magic" in prompt]
    assert all("Call me Ishmael." in prompt for prompt in own)
    asked.clear()
    assert run("--seed", "1") == 0
    assert not np.any(["Ishmael" in prompt for prompt in asked]) and not set(own) & set(asked)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc \xff", "novel.txt' is not UTF-8 text: byte 4 is invalid"),
        (b" \n", "novel.txt' is empty"),
        (None, "No such"),
    ],
)
def test_bad_haystack(run, asked, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "novel.txt").write_bytes(content)
    assert run("--haystack", str(tmp_path / "novel.txt")) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "640"], "context=640 is above 635, the model's length less 65 generated tokens"),
        (["--context", "50"], "length=50 is too short for"),
        (["--examples", "0"], "examples=0 must be at least 1"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--contxt", "50"], "--contxt is not a flag of this command; did you mean '--context'?"),
    ],
)
def test_bad_arguments(run, asked, capsys, arguments, message):
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not asked


def test_unwritable_out(run, asked, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run("--out", str(tmp_path / "file")) == 2
    assert run("--out", str(tmp_path / "file" / "below")) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"recycled: {tmp_path / 'file'}: File exists" and second.endswith("below: Not a directory")
    assert not asked
