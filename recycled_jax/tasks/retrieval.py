"""Retrieval tasks: facts hidden in a long text, a question about them, and the answers that count as right.

`single` hides one fact, `multikey` eight of the same form of which one is asked, `chain` a path whose next stage must
be looked up again after each one. The wording is this project's own (`TEMPLATE_VERSION`).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from recycled_jax.tasks.prose import generated_sentences
from recycled_jax.tasks.words import KEYS

TEMPLATE_VERSION = 1
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Fact:
    """A sentence to hide and the exchange that asks for it: `prompt` ends where the answer begins."""

    sentence: str
    question: str
    prompt: str
    answer: str

    @property
    def exchange(self) -> str:
        return f"\n{self.question} {self.prompt}"


def number_fact(key: str, value: str) -> Fact:
    statement = f"The magic number for {key} is "
    return Fact(f"{statement}{value}.", f"What is the magic number for {key}?", statement, f"{value}.")


def path_facts(stages: Sequence[str]) -> tuple[list[str], Fact]:
    """The sentences of a path through `stages`, one per hop, and the question that asks for all of it."""
    hops = [f"From {here} go to {there}." for here, there in zip(stages, stages[1:], strict=False)]
    first, rest = hops[0].split(" go to ", 1)
    answer = " ".join([rest, *hops[1:]])
    return hops, Fact(hops[0], f"Which way leads from {stages[0]}?", f"{first} go to", f" {answer}")


def random_value(rng: np.random.Generator, digits: int) -> str:
    """A number of `digits` digits without a leading zero."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


@dataclass(frozen=True)
class RetrievalTask:
    """`keys` facts of the same form are hidden and one is asked; with `hops` > 0, a path of that many hops among
    `keys` hops in all. `digits` is the length of the numbers."""

    keys: int = 1
    hops: int = 0
    digits: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.keys < len(KEYS) // 2:
            raise ValueError(f"keys={self.keys} must be between 1 and {len(KEYS) // 2 - 1}")
        if not 0 <= self.hops <= self.keys:
            raise ValueError(f"hops={self.hops} must be between 0 and keys={self.keys}")


TASKS = {
    "single": RetrievalTask(keys=1),
    "multikey": RetrievalTask(keys=8),
    "chain": RetrievalTask(keys=8, hops=4),
}


@dataclass(frozen=True)
class Example:
    """One question over one document. The prompt is `context + question + answer_prefix`; `outputs` are the strings
    an answer must contain; `gen_tokens` is what the gold answer needs, in tokens, with one for the end."""

    index: int
    context: str
    question: str
    answer_prefix: str
    outputs: tuple[str, ...]
    gold: str
    gen_tokens: int

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.answer_prefix


def make_example(
    task: RetrievalTask,
    *,
    length: int,
    seed: int,
    index: int,
    encode: Encode,
    haystack: Sequence[str] | None = None,
) -> Example:
    """Example `index` of a task, its prompt and answer together filling at most `length` tokens.

    Depends on its arguments only, never on how many examples are made. Facts stand at random sentence boundaries of
    the filler: sentences of `haystack` from a random start on (repeated if it is short), or generated ones.
    `encode` must count tokens as the model sees them, special tokens included.
    Raises ValueError when even the bare facts and question do not fit, naming the smallest length that works.
    """
    rng = _generator(task, length, seed, index)
    hidden, asked, outputs = _facts(task, rng)
    depths = rng.random(len(hidden))
    if haystack is None:
        filler = generated_sentences(rng, max(1, length // 6))
    else:
        start = rng.integers(len(haystack))
        filler = [haystack[(start + i) % len(haystack)] for i in range(max(1, length // 2))]
    gen_tokens = len(encode(asked.answer)) + 1

    def build(sentences: int) -> Example:
        text = " ".join(hide(hidden, depths, filler[:sentences]))
        return Example(index, text, f"\n{asked.question} ", asked.prompt, outputs, asked.answer, gen_tokens)

    def fits(sentences: int) -> bool:
        return len(encode(build(sentences).prompt)) + gen_tokens <= length

    if not fits(0):
        least = len(encode(build(0).prompt)) + gen_tokens
        raise ValueError(f"length={length} is too short for {task}, the smallest that works here is {least} tokens")
    low, high = 0, len(filler)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return build(low)


def hide(hidden: Sequence[str], depths: Sequence[float], filler: Sequence[str]) -> list[str]:
    """`filler` with each of `hidden` inserted at its depth (0 the beginning, 1 the end), at sentence boundaries."""
    places = sorted((int(depth * (len(filler) + 1)), order) for order, depth in enumerate(depths))
    sentences = list(filler)
    for place, order in reversed(places):
        sentences.insert(min(place, len(filler)), hidden[order])
    return sentences


def score(example: Example, answer: str) -> float:
    """Share of the expected strings that the answer contains, lower case (RULER's `string_match_all`), 0 to 1."""
    answer = answer.lower()
    return sum(output.lower() in answer for output in example.outputs) / len(example.outputs)


def _facts(task: RetrievalTask, rng: np.random.Generator) -> tuple[list[str], Fact, tuple[str, ...]]:
    if task.hops:
        names = [KEYS[i] for i in rng.permutation(len(KEYS))]
        stages = names[: task.hops + 1]
        sentences, asked = path_facts(stages)
        others = names[task.hops + 1 :]
        for i in range(task.keys - task.hops):
            sentences.append(path_facts(others[2 * i : 2 * i + 2])[0][0])
        return sentences, asked, tuple(stages[1:])
    keys = [KEYS[i] for i in rng.permutation(len(KEYS))[: task.keys]]
    values: list[str] = []
    while len(values) < task.keys:
        value = random_value(rng, task.digits)
        if value not in values:
            values.append(value)
    facts = [number_fact(key, value) for key, value in zip(keys, values, strict=True)]
    asked = rng.integers(task.keys)
    return [fact.sentence for fact in facts], facts[asked], (values[asked],)


def _generator(task: RetrievalTask, length: int, seed: int, index: int) -> np.random.Generator:
    canonical = json.dumps(
        {"task": asdict(task), "version": TEMPLATE_VERSION, "length": length, "seed": seed, "index": index},
        sort_keys=True,
    )
    return np.random.default_rng(int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big"))
