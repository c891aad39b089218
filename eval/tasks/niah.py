"""Needles in a haystack after NVIDIA/RULER (scripts/data/synthetic/niah.py): eight tasks by their parameters."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from eval.tasks.filling import Build, FilledTask, growing, joined, padding
from eval.tasks.task import Haystack
from eval.tasks.word_lists import NOISE, PAIRS, distinct, fresh, pair, pick, random_uuid
from recycled_jax.tasks.example import Encode, Example
from recycled_jax.tasks.prose import filler_sentences, generated_sentences
from recycled_jax.tasks.retrieval import hide, random_value
from recycled_jax.tasks.words import KEYS


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


HEADER = "Keep the magic {things} of this text in mind. The question comes at its end.\n"
FACT = "The magic {thing} for {key} is {value}."
ONE_OF_SEVERAL = "One magic {thing} for {key} is {value}."
QUESTION = "\nWhat is the magic {thing} for {keys}?"
QUESTION_SEVERAL = "\nWhat are all the magic {things} for {keys}?"
PREFIX = " The magic {thing} for {keys} is"
PREFIX_SEVERAL = " The magic {things} for {keys} are"

KINDS = ("noise", "essay", "needle")
DEPTHS = np.linspace(0, 1, 40)  # of needles in an essay


@dataclass(frozen=True)
class Niah(FilledTask):
    """`keys` keys with `values` values each are hidden; `queries` of them are asked.

    The text is `kind`: noise (one paragraph over and over), essay (prose: generated, or that of `haystack`) or needle
    (other keys and their values, a line each). Keys are words (adjective and noun), nouns (those that the embedded
    model knows), numbers or uuids; values numbers or uuids; numbers have `digits` digits.
    Raises ValueError for parameters that no text could be made of.
    """

    metric: ClassVar[str] = "all"
    kind: str = "essay"
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: str = "words"
    value_kind: str = "numbers"
    digits: int = 7
    gen_tokens: int = 128
    haystack: Haystack | None = None

    @property
    def takes_haystack(self) -> bool:
        return self.kind == "essay"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if self.key_kind not in ("words", "nouns", "numbers", "uuids"):
            raise ValueError(f"key_kind={self.key_kind!r} is not one of words, nouns, numbers, uuids")
        if self.value_kind not in ("numbers", "uuids"):
            raise ValueError(f"value_kind={self.value_kind!r} is not one of numbers, uuids")
        if (self.key_kind, self.value_kind) == ("uuids", "numbers"):
            raise ValueError("key_kind='uuids' needs value_kind='uuids', as a number may occur inside a uuid")
        for name in ("keys", "values", "queries", "gen_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.digits <= 18:
            raise ValueError(f"digits={self.digits} must be between 1 and 18")
        if self.haystack and self.kind != "essay":
            raise ValueError(f"kind={self.kind!r} reads no haystack, which is for kind='essay'")
        most = len(DEPTHS) if self.kind == "essay" else self._room
        if self._hidden * self.values > min(most, self._room):
            raise ValueError(
                f"keys={self.keys}, values={self.values} and queries={self.queries} hide {self._hidden * self.values} "
                f"needles, and {self} has room for {min(most, self._room)}"
            )

    @property
    def _hidden(self) -> int:
        """Keys with needles of their own."""
        return max(self.keys, self.queries)

    @property
    def _room(self) -> int:
        """How many different keys and values may be drawn: a third of those there are, drawing from which is fast and
        leaves as many for the values as for the keys."""
        numbers = 9 * 10 ** (self.digits - 1)
        pools = {"words": PAIRS, "nouns": len(KEYS), "numbers": numbers, "uuids": 2**122}
        return min(pools[self.key_kind], pools[self.value_kind]) // 3

    def _draw(self, rng: np.random.Generator, kind: str) -> str:
        match kind:
            case "words":
                return pair(rng)
            case "nouns":
                return pick(rng, KEYS)
            case "numbers":
                return random_value(rng, self.digits)
            case _:
                return random_uuid(rng)

    def draft(self, *, length: int, seed: int, index: int, encode: Encode) -> Build:
        rng = self.generator(length=length, seed=seed, index=index)
        prose = self.haystack.sentences if self.haystack else ()
        keys = distinct(lambda: self._draw(rng, self.key_kind), self._hidden)
        values = distinct(
            lambda: self._draw(rng, self.value_kind),
            self._hidden * self.values,
            free=lambda value: value not in keys and not any(value in sentence for sentence in prose),
        )
        of_key = dict(zip(keys, itertools.batched(values, self.values), strict=True))
        asked = keys[: self.queries]
        outputs = tuple(value for key in asked for value in of_key[key])
        thing = "number" if self.value_kind == "numbers" else "code"
        form = FACT if self.values == 1 else ONE_OF_SEVERAL
        needles = [form.format(thing=thing, key=key, value=value) for key in keys for value in of_key[key]]
        if self.kind == "essay":
            depths = rng.choice(DEPTHS, len(needles), replace=False).tolist()
        else:
            depths = rng.random(len(needles)).tolist()
        question, prefix = (QUESTION, PREFIX) if len(outputs) == 1 else (QUESTION_SEVERAL, PREFIX_SEVERAL)
        words = {"thing": thing, "things": f"{thing}s", "keys": listed(asked)}
        answer = f" {listed(outputs)}."
        asked_depths = depths[: len(outputs)]
        meta = {"depth": round(100 * asked_depths[0])} if len(outputs) == 1 else {}

        def lines() -> Iterator[str]:
            if self.kind == "noise":
                yield from itertools.repeat(NOISE)
            elif prose:
                yield from filler_sentences(rng, length, prose)
            elif self.kind == "essay":
                while True:
                    yield from generated_sentences(rng, 64)
            else:
                taken = {*keys, *values}
                for _ in range(self._room - len(values)):
                    key = fresh(lambda: self._draw(rng, self.key_kind), taken)
                    value = fresh(lambda: self._draw(rng, self.value_kind), taken)
                    yield form.format(thing=thing, key=key, value=value)

        filler = growing(lines())

        def build(units: int, pad: int) -> Example:
            separator = " " if self.kind == "essay" else "\n"
            text = hide(needles, depths, filler(units))
            return Example(
                index,
                HEADER.format(**words) + joined([*text, padding(pad)], separator),
                question.format(**words),
                prefix.format(**words),
                outputs,
                answer,
                self.gen_tokens,
                meta,
            )

        return build
