import json
import re
import shutil

import numpy as np
import pytest

from recycled_jax import cli
from recycled_jax.checkpoint import load_model
from recycled_jax.commands import generate as command
from recycled_jax.commands.prompts import ask
from recycled_jax.commands.streaming import Streamer
from recycled_jax.generate import generate
from recycled_jax.policies import make_policy
from recycled_jax.tokenizer import load_tokenizer
from tests.recycled_jax import tiny

POLICY = ["--policy", "recycled", "--policy.k", "16", "--policy.stride", "4"]
PROMPTS = [
    {"prompt": "Once upon a time", "id": "a"},
    {"context": "The café is red.\n", "question": " What is red? ", "id": "b"},
    {"prompt": "short", "weights": [1, 2]},
    {"context": "It is 5.", "question": "What is it?", "answer_prefix": "It is "},
    {"prompt": "the last of the prompts"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture
def run(model, prompts, tmp_path):
    """Runs `recycled generate` on the prompts, with further arguments; returns the exit status."""

    def run(*arguments: str, out: str = "out.jsonl", policy: list[str] = POLICY) -> int:
        files = ["--model", str(model), "--prompts", str(prompts), "--out", str(tmp_path / out)]
        return cli.main(["generate", *files, *policy, "--max-new-tokens", "12", "--batch", "2", *arguments])

    return run


@pytest.fixture
def interrupted(monkeypatch):
    """Lets `count` batches be decoded, then acts as Ctrl-C would."""

    def after(count: int) -> None:
        batches = iter(range(count))

        def decode(*arguments, **settings):
            if next(batches, None) is None:
                raise KeyboardInterrupt
            return generate(*arguments, **settings)

        monkeypatch.setattr(command, "decode_prompts", decode)

    yield after
    monkeypatch.undo()


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestResults:
    def test_one_prompt_streams_and_leaves_a_row(self, model, tmp_path, capsys):
        (tmp_path / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
        out = tmp_path / "one.jsonl"
        arguments = [
            "generate",
            "--model",
            str(model),
            "--prompt-file",
            str(tmp_path / "prompt.txt"),
            "--out",
            str(out),
        ]
        arguments += ["--max-new-tokens", "6", "--policy", "full"]
        assert cli.main(arguments) == 0
        streamed = capsys.readouterr().out
        (row,) = read_rows(out)
        assert row["index"] == 0 and row["text"] == streamed.removesuffix("\n")
        assert cli.main(arguments) == 0  # finished: nothing is decoded again
        assert capsys.readouterr().out == "" and read_rows(out) == [row]

    def test_a_row_for_every_prompt(self, run, model, tmp_path):
        assert run() == 0
        rows = read_rows(tmp_path / "out.jsonl")
        assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
        assert [row.get("id") for row in rows] == ["a", "b", None, None, None]
        assert rows[2]["weights"] == [1, 2]
        assert not any(name in row for row in rows for name in ("prompt", "context", "question", "answer_prefix"))

        tokenizer = load_tokenizer(model)
        texts = ["Once upon a time", "The café is red.\nWhat is red?"]
        alone = generate(
            *load_model(model),
            [tokenizer(text)["input_ids"] for text in texts],
            policy=make_policy("recycled", k=16, stride=4),
            max_new_tokens=12,
        )
        for index, row in enumerate(rows[:2]):
            assert row["text"] == tokenizer.decode(alone.tokens[index], skip_special_tokens=True)
            assert row["tokens"] == len(alone.tokens[index])
            assert row["log_prob_sum"] == pytest.approx(sum(alone.log_probs[index]), abs=1e-4)
            assert row["log_prob_mean"] == pytest.approx(np.mean(alone.log_probs[index]), abs=1e-4)
            assert row["stop"] == alone.stop[index]
            assert row["kv_bytes_per_token"] == pytest.approx(alone.telemetry.kv_bytes_per_token()[index])
            assert row["effective_stride"] == pytest.approx(np.mean(alone.telemetry.effective_stride()[:, index]))
        knobs = {"k": 16, "stride": 4, "refresh": "full", "pool": 7, "group_reduction": "max"}
        assert rows[0]["policy"] == {"name": "recycled", **knobs}

    def test_no_refresh_has_no_stride(self, run, tmp_path):
        assert run(policy=["--policy", "streaming", "--policy.k", "8"]) == 0
        assert {row["effective_stride"] for row in read_rows(tmp_path / "out.jsonl")} == {None}

    def test_lossless_gives_the_answers_of_full_attention(self, run, tmp_path):
        lossless = ["--policy", "streaming", "--policy.k", "8", "--lossless", "--draft", "3"]
        assert run(policy=lossless, out="lossless.jsonl") == run(policy=["--policy", "full"]) == 0
        ours, full = (read_rows(tmp_path / out) for out in ("lossless.jsonl", "out.jsonl"))
        assert [row["text"] for row in ours] == [row["text"] for row in full]
        assert ours[0]["policy"]["name"] == "streaming"

    def test_lossless_needs_the_whole_cache(self, run, tmp_path, capsys):
        assert run("--lossless", policy=["--policy", "streaming", "--policy.keep-cache", "false"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "out.jsonl").exists()

    def test_a_mesh_gives_the_same_answers(self, run, tmp_path):
        assert run() == run("--mesh", "{data: 2, tensor: 2, sequence: 2}", out="mesh.jsonl") == 0
        ours, alone = (read_rows(tmp_path / out) for out in ("mesh.jsonl", "out.jsonl"))
        assert [row["text"] for row in ours] == [row["text"] for row in alone]
        assert [row["log_prob_sum"] for row in ours] == pytest.approx([row["log_prob_sum"] for row in alone], abs=1e-4)

    @pytest.mark.parametrize(
        ("mesh", "message"),
        [
            ("{tensro: 2}", "mesh has the axis 'tensro'; did you mean 'tensor'?"),
            ("{data: 2, tensor: 4}", "mesh has tensor=4, expected a divisor of kv_heads=2"),
            ("{data: 3}", "mesh={'data': 3, 'fsdp': 1, 'tensor': 1, 'sequence': 1} needs a multiple of 3 devices"),
        ],
    )
    def test_a_mesh_that_cannot_be(self, run, tmp_path, capsys, mesh, message):
        assert run("--mesh", mesh) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out.jsonl").exists()

    def test_a_seed_draws_the_same_again(self, run, tmp_path):
        for out, seed in (("one", "3"), ("two", "3"), ("other", "4")):
            assert run("--temperature", "1", "--seed", seed, out=out) == 0
        one, two, other = (read_rows(tmp_path / out) for out in ("one", "two", "other"))
        assert one == two != other


def test_question_form():
    assert ask("A text.\n\n", " What? ") == "A text.\nWhat?"
    assert ask("A text.", "What is 5?", "5 is ") == "A text.\nWhat is 5? 5 is "


class TestResume:
    @pytest.mark.parametrize("sampling", [[], ["--temperature", "1"]])
    def test_ctrl_c_loses_no_finished_line_and_the_rest_follows(self, run, interrupted, tmp_path, capsys, sampling):
        assert run(*sampling, out="whole.jsonl") == 0
        interrupted(1)
        assert run(*sampling) == 130
        assert "recycled: interrupted; 2 of 5 results are in" in capsys.readouterr().err
        assert [row["index"] for row in read_rows(tmp_path / "out.jsonl")] == [0, 1]
        interrupted(10)
        assert run(*sampling) == 0
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_a_torn_last_line_is_cut(self, run, tmp_path):
        out = tmp_path / "out.jsonl"
        assert run() == 0
        whole = out.read_bytes()
        ends = [place.end() for place in re.finditer(b"\n", whole)]
        out.write_bytes(whole[: ends[2] + 9])
        assert run() == 0
        assert out.read_bytes() == whole

    def test_nothing_is_decoded_when_all_is_there(self, run, interrupted, tmp_path):
        assert run() == 0
        before = (tmp_path / "out.jsonl").read_bytes()
        interrupted(0)
        assert run() == 0
        assert (tmp_path / "out.jsonl").read_bytes() == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--policy.k", "17"], "was written with policy.k=16, this run has 17"),
            (["--temperature", "0.5"], "was written with sampling.temperature=0.0, this run has 0.5"),
            (["--max-new-tokens", "13"], "was written with max_new_tokens=12, this run has 13"),
            (["--dtype", "bfloat16"], "was written with dtype='float32', this run has 'bfloat16'"),
            (["--batch", "3"], "was written with batch=2, this run has 3"),
            (["--policy.name", "streaming"], "policy.stride is not a knob of 'streaming'"),
        ],
    )
    def test_other_settings_are_refused(self, run, interrupted, tmp_path, capsys, change, message):
        interrupted(1)
        assert run() == 130
        before = (tmp_path / "out.jsonl").read_bytes()
        assert run(*change) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert (tmp_path / "out.jsonl").read_bytes() == before

    def test_another_model_is_refused(self, run, interrupted, model, tmp_path, capsys):
        interrupted(1)
        assert run() == 130
        assert run("--model", str(shutil.copytree(model, tmp_path / "copy"))) == 2
        assert "was written with model=" in capsys.readouterr().err

    def test_other_prompts_are_refused(self, run, interrupted, prompts, capsys):
        interrupted(1)
        assert run() == 130
        prompts.write_text(prompts.read_text().replace("Once", "Twice"))
        assert run() == 2
        assert "line 1 answers another prompt than number 0 of the prompts" in capsys.readouterr().err

    def test_prompts_may_be_added(self, run, prompts, tmp_path):
        assert run() == 0
        with prompts.open("a") as file:
            file.write('{"prompt": "one more"}\n')
        assert run() == 0
        assert [row["index"] for row in read_rows(tmp_path / "out.jsonl")] == [0, 1, 2, 3, 4, 5]

    def test_a_failed_start_binds_nobody(self, run, interrupted):
        interrupted(0)
        assert run() == 130
        interrupted(10)
        assert run("--seed", "1") == 0

    def test_a_file_of_something_else_is_refused(self, run, tmp_path, capsys):
        (tmp_path / "out.jsonl").write_text("my notes\n")
        assert run() == 2
        assert "line 1 is not a result of `recycled generate`; name a new file" in capsys.readouterr().err
        assert (tmp_path / "out.jsonl").read_text() == "my notes\n"

    def test_results_without_their_settings_are_refused(self, run, tmp_path, capsys):
        assert run() == 0
        (tmp_path / "out.jsonl.settings.json").unlink()
        assert run() == 2
        assert "out.jsonl.settings.json, which says what they were made with, is missing" in capsys.readouterr().err


class TestStreaming:
    def test_gives_the_text_of_the_batch(self, run, model, tmp_path, capfd):
        assert run(policy=POLICY) == 0
        rows = read_rows(tmp_path / "out.jsonl")
        (tmp_path / "context.txt").write_text("It is 5.\n", encoding="utf-8")
        capfd.readouterr()
        asked = ["--question", "What is it?", "--answer-prefix", "It is "]
        arguments = ["--prompt-file", str(tmp_path / "context.txt"), *asked, *POLICY, "--max-new-tokens", "12"]
        assert cli.main(["generate", "--model", str(model), *arguments]) == 0
        printed = capfd.readouterr()
        assert printed.out == rows[3]["text"] + "\n"
        assert re.search(
            r"12 tokens \(limit\); prompt of 28 tokens read in .*; [\d.]+ tokens/s after the first 9; "
            r"effective stride 5\.5; KV read per token 0\.\d+ MB, dense 0\.\d+ MB",
            printed.err,
        )

    def test_prints_whole_characters_only(self):
        text = "naïve 日本 🙂!"
        printed = []
        stream = Streamer(lambda tokens: bytes(tokens).decode("utf-8", "replace"), printed.append)
        for byte in text.encode():
            stream([[byte]])
        stream.finish()
        assert printed[-1] == "\n" and [piece for piece in printed[:-1] if piece] == list(text)

    def test_prints_what_stays_broken_at_the_end(self):
        printed = []
        stream = Streamer(lambda tokens: bytes(tokens).decode("utf-8", "replace"), printed.append)
        stream([[*b"a"]])
        stream([[0xE6, 0x97]])
        assert "".join(printed) == "a"
        stream.finish()
        assert "".join(printed) == "a\ufffd\n"

    def test_ctrl_c_keeps_the_text_so_far(self, model, tmp_path, capsys, monkeypatch):
        def decode(*arguments, on_block, **settings):
            on_block([[*b"so far"]])
            raise KeyboardInterrupt

        monkeypatch.setattr(command, "decode_prompts", decode)
        (tmp_path / "text.txt").write_text("some text")
        assert cli.main(["generate", "--model", str(model), "--prompt-file", str(tmp_path / "text.txt")]) == 130
        tokenizer = tiny.byte_tokenizer()
        printed = capsys.readouterr()
        assert printed.out == tokenizer.decode([*b"so far"]) + "\n"
        assert printed.err.endswith("recycled: interrupted\n")


def refused(arguments: list[str], message: str, capsys) -> None:
    assert cli.main(["generate", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("recycled: ") and printed.err.count("\n") == 1, printed.err
    assert printed.out == ""


class TestBadInput:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"prompt": ', "line 2 is not valid JSON"),
            ('"text"', "line 2 holds a str, expected an object with 'prompt'"),
            ('{"prompt": 3}', "line 2 has prompt=3, expected a string"),
            ('{"prompt": " \\n"}', "line 2 has an empty prompt"),
            (
                '{"text": "a"}',
                "line 2 has none of the fields prompt, context, question, answer_prefix, expected either",
            ),
            ('{"context": "a"}', "line 2 has context of the fields"),
            ('{"prompt": "a", "question": "b"}', "line 2 has prompt, question of the fields"),
            ('{"prompt": "a", "stop": 1}', "line 2 has the field 'stop', which the results use for their own"),
        ],
    )
    def test_line(self, line, message, model, tmp_path, capsys):
        (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
        files = ["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out.jsonl")]
        refused(["--model", str(model), *files], message, capsys)
        assert not (tmp_path / "out.jsonl").exists()

    @pytest.mark.parametrize("content", [b"", b"\n \n"])
    def test_no_prompts(self, content, model, tmp_path, capsys):
        (tmp_path / "p.jsonl").write_bytes(content)
        files = ["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out.jsonl")]
        refused(["--model", str(model), *files], "p.jsonl holds no prompt", capsys)

    @pytest.mark.parametrize("flag", ["--prompts", "--prompt-file"])
    def test_not_utf8(self, flag, model, tmp_path, capsys):
        (tmp_path / "p").write_bytes(b"abc\xff")
        out = ["--out", str(tmp_path / "out.jsonl")] if flag == "--prompts" else []
        refused(["--model", str(model), flag, str(tmp_path / "p"), *out], "p is not UTF-8 text: byte 3", capsys)

    def test_empty_prompt_file(self, model, tmp_path, capsys):
        (tmp_path / "p").write_text(" \n")
        refused(["--model", str(model), "--prompt-file", str(tmp_path / "p")], "p is empty, expected the text", capsys)

    def test_missing_prompt_file(self, model, tmp_path, capsys):
        arguments = ["--model", str(model), "--prompt-file", str(tmp_path / "p")]
        refused(arguments, f"recycled: {tmp_path / 'p'}: No such file or directory", capsys)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "expected either prompt_file or prompts, got neither"),
            (["--prompts", "a", "--prompt-file", "b"], "expected either prompt_file or prompts, got both"),
            (["--prompts", "a"], "prompts='a' needs out"),
            (["--prompt-file", "a", "--answer-prefix", "b"], "answer_prefix='b' needs question"),
            (["--prompts", "a", "--out", "b", "--question", "c"], "question='c' is for prompt_file"),
            (["--prompt-file", "a", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
            (["--prompt-file", "a", "--batch", "0"], "batch=0 must be at least 1"),
            (["--prompt-file", "a", "--seed", "-1"], "seed=-1 must be between 0 and"),
            (["--prompt-file", "a", "--temperature", "-1"], "temperature=-1.0 must be at least 0"),
            (["--prompt-file", "a", "--policy.pool", "2"], "pool=2 must be odd"),
        ],
    )
    def test_arguments(self, arguments, message, capsys):
        refused(arguments, message, capsys)

    def test_prompt_longer_than_the_model(self, model, tmp_path, capsys):
        lines = [{"prompt": "short"}, {"prompt": "x" * tiny.MAX_LENGTH}]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        files = ["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out.jsonl")]
        message = "p.jsonl line 2 has a prompt of 2049 tokens, with max_new_tokens=128 it needs 2177 cache slots, "
        refused(["--model", str(model), *files], message + "the model's length", capsys)
        assert not (tmp_path / "out.jsonl").exists()

    def test_prompt_longer_than_the_capacity(self, run, tmp_path, capsys):
        assert run("--capacity", "30") == 2
        message = "line 2 has a prompt of 31 tokens, with max_new_tokens=12 it needs 43 cache slots, capacity is 30"
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out.jsonl").exists()

    def test_an_explicit_capacity_goes_beyond_the_model(self, model, tmp_path, capsys):
        (tmp_path / "p").write_text("x" * tiny.MAX_LENGTH)
        arguments = ["--prompt-file", str(tmp_path / "p"), "--max-new-tokens", "2", "--capacity", "3000"]
        assert cli.main(["generate", "--model", str(model), *arguments]) == 0

    @pytest.mark.parametrize("place", ["nowhere/out.jsonl", "."])
    def test_unwritable_out(self, place, run, interrupted, capsys):
        interrupted(0)  # decoding anything would end with status 130
        assert run(out=place) == 2
        assert re.match(r"recycled: .*: (No such file or directory|Is a directory)\n", capsys.readouterr().err)

    def test_a_tokenizer_of_another_model(self, tmp_path, capsys):
        folder = tiny.save_tiny(tmp_path / "small", vocab=200)
        (tmp_path / "p").write_text("some text")
        arguments = ["--model", str(folder), "--prompt-file", str(tmp_path / "p")]
        refused(arguments, "has token id 256, the model's vocabulary has 200: the tokenizer in", capsys)

    def test_a_damaged_model(self, model, tmp_path, capsys):
        folder = shutil.copytree(model, tmp_path / "damaged")
        (folder / "model.safetensors").write_bytes(b"damaged")
        (tmp_path / "p").write_text("some text")
        arguments = ["--model", str(folder), "--prompt-file", str(tmp_path / "p")]
        refused(arguments, "model.safetensors is not a complete safetensors file", capsys)

    def test_a_missing_model(self, tmp_path, capsys):
        (tmp_path / "p").write_text("some text")
        arguments = ["--model", str(tmp_path / "nowhere"), "--prompt-file", str(tmp_path / "p")]
        refused(arguments, "nowhere' does not exist, expected the folder of a checkpoint", capsys)
