"""Retrieval tasks: facts hidden in a long text, a question about them, and the answers that count as right.

`single` hides one fact, `multikey` eight of the same form of which one is asked, `chain` a path whose next stage must
be looked up again after each one. The wording is this project's own (`TEMPLATE_VERSION`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from recycled_jax.tasks.example import Encode, Example, generator
from recycled_jax.tasks.prose import filler_sentences
from recycled_jax.tasks.words import KEYS

TEMPLATE_VERSION = 1


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
    hops = [f"From {here} go to {there}." for here, there in itertools.pairwise(stages)]
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
    the filler: sentences of `haystack` from a random start on (repeated if it is short, cut where one is so long that
    the text could not be filled well), or generated ones.
    `encode` must count tokens as the model sees them, special tokens included.
    Raises ValueError when even the bare facts and question do not fit, naming the smallest length that works.
    """
    draft = _Draft(task, length, seed, index, encode)
    if draft.tokens(()) > length:
        longer = (_Draft(task, n, seed, index, encode) for n in itertools.count(max(length, 0) + 1))
        least = next(bare.length for bare in longer if bare.tokens(()) <= bare.length)
        raise ValueError(f"length={length} is too short for {task}, the smallest that works here is {least} tokens")
    filler = filler_sentences(draft.rng, length, haystack)
    low, high = 0, len(filler)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if draft.tokens(filler[:middle]) <= length else (low, middle - 1)
    return draft.build(filler[:low])


class _Draft:
    """The random part of an example: everything but its filler, which `rng` may still choose."""

    def __init__(self, task: RetrievalTask, length: int, seed: int, index: int, encode: Encode):
        self.length, self.index, self.encode = length, index, encode
        self.rng = _generator(task, length, seed, index)
        self.hidden, self.asked, self.outputs = _facts(task, self.rng)
        self.depths = self.rng.random(len(self.hidden)).tolist()
        self.gen_tokens = len(encode(self.asked.answer)) + 1

    def build(self, filler: Sequence[str]) -> Example:
        text = " ".join(hide(self.hidden, self.depths, filler))
        question, prefix, gold = f"\n{self.asked.question} ", self.asked.prompt, self.asked.answer
        return Example(self.index, text, question, prefix, self.outputs, gold, self.gen_tokens)

    def tokens(self, filler: Sequence[str]) -> int:
        """Tokens of prompt and answer."""
        return len(self.encode(self.build(filler).prompt)) + self.gen_tokens


def hide[T](hidden: Sequence[T], depths: Sequence[float], filler: Sequence[T]) -> list[T]:
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
    asked = int(rng.integers(task.keys))
    return [fact.sentence for fact in facts], facts[asked], (values[asked],)


def _generator(task: RetrievalTask, length: int, seed: int, index: int) -> np.random.Generator:
    return generator(task=asdict(task), version=TEMPLATE_VERSION, length=length, seed=seed, index=index)
