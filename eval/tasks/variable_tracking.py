"""A number is given to a name, and from name to name along a chain: which names stand for it? After NVIDIA/RULER
(scripts/data/synthetic/variable_tracking.py); one solved example stands in front."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from eval.tasks.filling import Build, FilledTask, fit, joined, padding
from eval.tasks.word_lists import NOISE, code, distinct
from recycled_jax.tasks.example import Encode, Example
from recycled_jax.tasks.retrieval import hide, random_value

HEADER = "Follow how numbers are given to names in this text.\n"
FIRST = "Let {name} be {number}."
NEXT = "Let {name} be what {before} is."
QUESTION = "\nWhich {count} names stand for {number}?"
PREFIX = " The {count} names that stand for {number} are"
SOLVED = "{text}{question}{prefix}{answer}\n\nNow the same for another text.\n"

NAME_LETTERS = 5


@dataclass(frozen=True)
class _Chains:
    """Sentences to hide, in the order and at the depths that they keep; the names of the first chain are asked."""

    sentences: Sequence[str]
    depths: Sequence[float]
    names: tuple[str, ...]
    number: str

    def text(self, lines: int, pad: int = 0) -> str:
        return HEADER + joined([*hide(self.sentences, self.depths, [NOISE] * lines), padding(pad)], "\n")

    @property
    def question(self) -> str:
        return QUESTION.format(count=len(self.names), number=self.number)

    @property
    def prefix(self) -> str:
        return PREFIX.format(count=len(self.names), number=self.number)

    @property
    def answer(self) -> str:
        return f" {' '.join(self.names)}"

    def solved(self, lines: int) -> str:
        return SOLVED.format(text=self.text(lines), question=self.question, prefix=self.prefix, answer=self.answer)


@dataclass(frozen=True)
class VariableTracking(FilledTask):
    """`chains` chains of `hops` hops, of which the first is asked; numbers of `digits` digits. The solved example has
    `example_tokens` tokens, or as few as it needs if that is more; 0 leaves it out. Its names and numbers are others.

    Raises ValueError for parameters that no text could be made of.
    """

    metric: ClassVar[str] = "all"
    chains: int = 1
    hops: int = 4
    digits: int = 5
    example_tokens: int = 500
    gen_tokens: int = 30

    def __post_init__(self) -> None:
        for name in ("chains", "hops", "gen_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.example_tokens < 0:
            raise ValueError(f"example_tokens={self.example_tokens} must not be negative")
        if not 1 <= self.digits <= 18:
            raise ValueError(f"digits={self.digits} must be between 1 and 18")
        if 4 * self.chains > 9 * 10 ** (self.digits - 1):
            raise ValueError(f"digits={self.digits} has too few numbers for chains={self.chains}; raise digits")

    def draft(self, *, length: int, seed: int, index: int, encode: Encode) -> Build:
        rng = self.generator(length=length, seed=seed, index=index)
        # capitals without vowels, so that no word has a name in it, whatever the case
        names = distinct(lambda: code(rng, NAME_LETTERS).upper(), 2 * self.chains * (self.hops + 1))
        numbers = distinct(lambda: random_value(rng, self.digits), 2 * self.chains)
        half = len(names) // 2
        asked = self._chains(rng, names[:half], numbers[: self.chains])
        solved = ""
        if self.example_tokens:
            shown = self._chains(rng, names[half:], numbers[self.chains :])
            most = self.example_tokens
            lines, _ = fit(lambda n: len(encode(shown.solved(n))), most, most=most)
            solved = shown.solved(lines)

        def build(units: int, pad: int) -> Example:
            return Example(
                index,
                solved + asked.text(units, pad),
                asked.question,
                asked.prefix,
                asked.names,
                asked.answer,
                self.gen_tokens,
                {"value": asked.number},
            )

        return build

    def _chains(self, rng: np.random.Generator, names: Sequence[str], numbers: Sequence[str]) -> _Chains:
        chains = [names[i :: self.chains] for i in range(self.chains)]
        sentences: list[str] = []
        depths: list[float] = []
        for chain, number in zip(chains, numbers, strict=True):
            sentences.append(FIRST.format(name=chain[0], number=number))
            sentences += [NEXT.format(name=name, before=before) for before, name in itertools.pairwise(chain)]
            depths += np.sort(rng.random(len(chain))).tolist()
        return _Chains(sentences, depths, tuple(chains[0]), numbers[0])
