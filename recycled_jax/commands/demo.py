"""`recycled demo`: facts hidden in a long text, found again under several policies."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from recycled_jax.commands.demo_report import AnsweredExample, PolicyRow, SpeedRow, write_report
from recycled_jax.commands.loading import Checkpoint, Text
from recycled_jax.commands.measure import BLOCK, BLOCKS, Measurement, measure
from recycled_jax.generate import read
from recycled_jax.policies import make_policy
from recycled_jax.tasks.example import Example
from recycled_jax.tasks.prose import generated_sentences, read_haystack
from recycled_jax.tasks.retrieval import TASKS, make_example, score

POLICIES = {
    "full": make_policy("full"),
    "recycled k=256 stride=8": make_policy("recycled", k=256, stride=8),
    "recycled-dynamic k=256 stride=8": make_policy("recycled-dynamic", k=256, stride=8),
    "streaming k=256": make_policy("streaming", k=256),
}
COMPARED = ("full", "recycled k=256 stride=8")  # against context length
TASK_NAMES = ("single", "multikey")
BATCH = 8
NEW_TOKENS = BLOCK * BLOCKS + 1


def demo(
    *,
    haystack: Path | None = None,
    context: int = 4096,
    examples: int = 8,
    out: Path = Path("demo_out"),
    seed: int = 0,
    model: str | None = None,
) -> None:
    """Hides facts in a long text, asks for them, and compares policies in accuracy, speed and bytes read.

    Prints one table and one question with everybody's answer; writes demo.csv (the table), demo_speed.csv (time per
    token against context length) and demo.png.

    Args:
        haystack: UTF-8 text to hide the facts in; generated sentences when not given.
        context: Tokens of document and question.
        examples: Questions per task.
        out: Folder for the files.
        seed: Of facts and text.
        model: Folder of a checkpoint, or name of a model in the local Hugging Face cache; the embedded model when not
            given.
    """
    if examples < 1:
        raise ValueError(f"examples={examples} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    sentences = None if haystack is None else read_haystack(haystack)
    _make_writable(out)
    checkpoint = Checkpoint.find(model)
    longest = checkpoint.config.max_length - NEW_TOKENS
    if context > longest:
        raise ValueError(f"context={context} is above {longest}, the model's length less {NEW_TOKENS} generated tokens")
    questions = {
        name: [
            make_example(
                TASKS[name], length=context, seed=seed, index=i, encode=checkpoint.text.encode, haystack=sentences
            )
            for i in range(examples)
        ]
        for name in TASK_NAMES
    }
    lengths = [length for length in (context // 4, context, 2 * context, 4 * context) if length <= longest]
    network, params = checkpoint.load("float32")

    groups = len(TASK_NAMES) * -(-examples // BATCH)
    with tqdm(total=groups * len(POLICIES) + len(lengths) * len(COMPARED), unit="run", file=sys.stderr) as progress:

        def run(prompts: Sequence[Sequence[int]], labels: Sequence[str]) -> dict[str, Measurement]:
            """Every policy named, on one prefill."""
            length = max(map(len, prompts))
            progress.set_description(f"reading {length} tokens")
            prefilled = read(network, params, prompts, max_new_tokens=NEW_TOKENS)
            measured = {}
            for label in labels:
                progress.set_description(f"{label}, {length} tokens")
                measured[label] = measure(network, params, prefilled, policy=POLICIES[label])
                progress.update()
            return measured

        rows, shown = _compare(checkpoint.text, questions, run)
        speeds = _speeds(checkpoint.text, lengths, run)
    write_report(out, rows, speeds, shown, context=context, batch=min(BATCH, examples))


def _make_writable(out: Path) -> None:
    """Creates the folder; raises OSError when files cannot be made in it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


Run = Callable[[Sequence[Sequence[int]], Sequence[str]], dict[str, Measurement]]


def _compare(text: Text, questions: dict[str, list[Example]], run: Run) -> tuple[list[PolicyRow], AnsweredExample]:
    """A row of the table for every policy, and the last task's first example with each policy's answer."""
    measured: dict[str, list[Measurement]] = {label: [] for label in POLICIES}
    accuracy: dict[str, dict[str, float]] = {label: {} for label in POLICIES}
    shown: dict[str, str] = {}
    for task, examples in questions.items():
        answers: dict[str, list[str]] = {label: [] for label in POLICIES}
        for first in range(0, len(examples), BATCH):
            # the last batch is filled up from the front, so that all have one shape and one speed
            group = [examples[i % len(examples)] for i in range(first, first + min(BATCH, len(examples)))]
            for label, result in run([text.encode(example.prompt) for example in group], list(POLICIES)).items():
                measured[label].append(result)
                answers[label] += [text.decode(tokens) for tokens in result.tokens]
        for label, given in answers.items():
            accuracy[label][task] = float(np.mean([score(e, a) for e, a in zip(examples, given, strict=False)]))
            shown[label] = given[0]
    rows = [PolicyRow.summarize(label, accuracy[label], measured[label]) for label in POLICIES]
    return rows, AnsweredExample(questions[TASK_NAMES[-1]][0], shown)


def _speeds(text: Text, lengths: Sequence[int], run: Run) -> list[SpeedRow]:
    """Time per token of one row, for documents of several lengths."""
    sentences = generated_sentences(np.random.default_rng(0), max(lengths) // 4)
    tokens = text.encode(" ".join(sentences))
    return [
        SpeedRow(label, length, measured)
        for length in lengths
        for label, measured in run([(tokens * -(-length // len(tokens)))[:length]], COMPARED).items()
    ]
