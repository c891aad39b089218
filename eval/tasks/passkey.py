"""A pass key in a text that repeats itself, as LongHeads runs it (passkey_retrieval/passkey_retrieval.py of its
repository); the wording is ours."""

import itertools
from dataclasses import dataclass
from typing import ClassVar

from eval.tasks.filling import Draft, fitted
from eval.tasks.sentences import Filler, insert_at
from eval.tasks.task import Task
from eval.tasks.word_lists import check_digits, distinct_numbers
from recycled_jax.tasks.example import Encode, Example

OPENING = "One line of this text holds a pass key. Nothing else in it matters. The pass key is asked for at the end."
FILLER = (
    "The mill stands still.",
    "A cart rolls slowly down the lane.",
    "Smoke rises over the roofs, and the clouds go by.",
    "There is nothing here that anybody needs to know.",
)
FACT = "The pass key is {key}. Keep it in mind: {key} is the pass key."
QUESTION = "\nWhat is the pass key? "
PREFIX = "The pass key is "
GOLD = "{key}."
GEN_TOKENS = 16


@dataclass(frozen=True)
class Passkey(Task):
    """A number of `digits` digits, said twice in one line at `depth` percent of the text, at a random place when None.

    The score is 100 if the first integer of the output is the key."""

    metric: ClassVar[str] = "passkey"

    digits: int = 5
    depth: float | None = None

    def __post_init__(self) -> None:
        check_digits(self.digits)
        if self.depth is not None and not 0 <= self.depth <= 100:
            raise ValueError(f"depth={self.depth} must be between 0 and 100 percent, or None for a random place")

    def example(self, *, length: int, seed: int, index: int, encode: Encode) -> Example:
        """As `Task.example`; `meta` has the `depth` in percent."""

        def draft(length: int) -> Draft:
            rng = self.generator(length=length, seed=seed, index=index)
            (key,) = distinct_numbers(rng, 1, self.digits)
            place = 100 * rng.random()
            depth = place if self.depth is None else self.depth
            words = sum(len(sentence.split()) for sentence in FILLER)
            rounds = max(length, 0) // words + 1  # a token holds a word at most
            filler = Filler(list(itertools.islice(itertools.cycle(FILLER), len(FILLER) * rounds)))

            def build(words: int) -> Example:
                sized = [(sentence, len(sentence)) for sentence in filler.first(words)]
                text = " ".join([OPENING, *insert_at(FACT.format(key=key), depth, sized)])
                meta = {"depth": round(depth, 2)}
                return Example(index, text, QUESTION, PREFIX, (key,), GOLD.format(key=key), GEN_TOKENS, meta)

            return build, filler.words

        return fitted(draft, length=length, encode=encode, task=self)
