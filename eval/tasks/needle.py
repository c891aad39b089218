"""One fact at a depth measured in tokens, over a grid of depths; wrong facts of the same form beside it if asked."""

from dataclasses import dataclass
from typing import ClassVar

from eval.tasks.filling import Draft, fitted
from eval.tasks.sentences import Filler, insert_at, token_sizes
from eval.tasks.task import Haystack, Task
from eval.tasks.word_lists import check_digits, distinct_numbers
from recycled_jax.tasks.example import Encode, Example
from recycled_jax.tasks.prose import filler_sentences
from recycled_jax.tasks.retrieval import hide
from recycled_jax.tasks.words import KEYS

FACT = "The magic number for {key} is {value}."
QUESTION = "\nWhat is the magic number for {key}? "
PREFIX = "The magic number for {key} is "
GOLD = "{value}."
GEN_TOKENS = 32


@dataclass(frozen=True)
class Needle(Task):
    """Example i asks for the number of a key that stands at `depths[i % len(depths)]` percent of the context's tokens,
    0 the beginning and 100 the end, between two sentences. `distractors` other keys stand at random depths; numbers
    have `digits` digits. `haystack` is the text around them, the seeded grammar's when None."""

    metric: ClassVar[str] = "all"

    depths: tuple[float, ...] = tuple(range(0, 101, 10))
    distractors: int = 0
    digits: int = 7
    haystack: Haystack | None = None

    def __post_init__(self) -> None:
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"depths={self.depths} must be one percentage or more, each between 0 and 100")
        if not 0 <= self.distractors < len(KEYS):
            raise ValueError(f"distractors={self.distractors} must be between 0 and {len(KEYS) - 1}")
        check_digits(self.digits, count=self.distractors + 1)

    def example(self, *, length: int, seed: int, index: int, encode: Encode) -> Example:
        """As `Task.example`; `meta` has the `depth` in percent."""

        def draft(length: int) -> Draft:
            rng = self.generator(length=length, seed=seed, index=index)
            sentences = filler_sentences(rng, length, self.haystack and self.haystack.sentences)
            sizes = token_sizes(sentences, encode, enough=length)
            filler = Filler(sentences[: len(sizes)])
            keys = [KEYS[i] for i in rng.permutation(len(KEYS))[: self.distractors + 1]]
            values = distinct_numbers(rng, self.distractors + 1, self.digits, avoid=" ".join(filler.sentences))
            facts = [FACT.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
            fact, *wrong = zip(facts, token_sizes(facts, encode, block=1), strict=True)
            wrong_depths = rng.random(len(wrong)).tolist()
            depth = self.depths[index % len(self.depths)]

            def build(words: int) -> Example:
                around = hide(wrong, wrong_depths, list(zip(filler.first(words), sizes, strict=False)))
                text = " ".join(insert_at(fact[0], depth, around))
                asked = {"key": keys[0], "value": values[0]}
                question, prefix, gold = (template.format(**asked) for template in (QUESTION, PREFIX, GOLD))
                return Example(index, text, question, prefix, (values[0],), gold, GEN_TOKENS, {"depth": depth})

            return build, filler.words

        return fitted(draft, length=length, encode=encode, task=self)
