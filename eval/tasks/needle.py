"""One fact at a depth measured in tokens, over a grid of depths, with wrong facts of the same form beside it if asked.

Also how this and the other tasks with prose cut their filler at a word (`Filler`) and find how much fits (`fitted`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from eval.tasks.task import Haystack, Task
from recycled_jax.tasks.example import Encode, Example
from recycled_jax.tasks.prose import filler_sentences
from recycled_jax.tasks.retrieval import hide
from recycled_jax.tasks.words import KEYS

FACT = "The magic number for {key} is {value}."
QUESTION = "\nWhat is the magic number for {key}? "
PREFIX = "The magic number for {key} is "
GOLD = "{value}."
GEN_TOKENS = 32

_BLOCK = 16  # sentences counted at once: a call of a tokenizer costs as much as a hundred characters

# What is random about an example of a length: `build(n)` has n units of filler, of which there are `units`.
type Draft = tuple[Callable[[int], Example], int]


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


class Filler:
    """Sentences, of which the first words can be had."""

    def __init__(self, sentences: Sequence[str]):
        self.sentences = sentences
        self._ends = np.cumsum([len(sentence.split()) for sentence in sentences])

    @property
    def words(self) -> int:
        return int(self._ends[-1])

    def first(self, words: int) -> list[str]:
        """The sentences of the first `words` words; a last one that is cut ends with a full stop."""
        whole = int(np.searchsorted(self._ends, words, side="right"))
        left = words - int(self._ends[whole - 1]) if whole else words
        if not left or whole == len(self.sentences):
            return list(self.sentences[:whole])
        cut = " ".join(self.sentences[whole].split()[:left])
        return [*self.sentences[:whole], cut.rstrip(".,;:!?") + "."]


def insert_at(fact: str, depth: float, around: Sequence[tuple[str, float]]) -> list[str]:
    """Sentences, each given with its size, and `fact` at the boundary nearest to `depth` percent of their sum."""
    ends = np.cumsum([0.0, *(size for _, size in around)])
    place = int(np.abs(ends - depth / 100 * ends[-1]).argmin()) if depth < 100 else len(around)
    sentences = [sentence for sentence, _ in around]
    return [*sentences[:place], fact, *sentences[place:]]


def token_sizes(
    sentences: Sequence[str], encode: Encode, *, enough: float = float("inf"), block: int = _BLOCK
) -> list[float]:
    """Tokens of each sentence, up to where they come to more than `enough` in all. `block` sentences are counted
    together and their tokens shared out by characters."""
    special = len(encode(""))
    sizes: list[float] = []
    total = 0.0
    for first in range(0, len(sentences), block):
        if total > enough:
            break
        texts = sentences[first : first + block]
        tokens = len(encode(" ".join(texts))) - special
        characters = sum(map(len, texts))
        sizes += [tokens * len(text) / characters for text in texts]
        total += tokens
    return sizes


def check_digits(digits: int, *, count: int = 1) -> None:
    """Raises ValueError when there are fewer than twice `count` numbers of so many digits, or they are too big."""
    if not (1 <= digits <= 18 and 9 * 10 ** (digits - 1) >= 2 * count):
        raise ValueError(f"digits={digits} must be between 1 and 18 and allow for {count} different numbers")


def distinct_numbers(rng: np.random.Generator, count: int, digits: int, *, avoid: str = "") -> list[str]:
    """`count` numbers of `digits` digits, none of which begins with 0, occurs twice or is found in `avoid`."""
    found: dict[str, None] = {}
    while len(found) < count:
        value = str(rng.integers(10 ** (digits - 1), 10**digits))
        if value not in avoid:
            found[value] = None
    return list(found)


def prompt_and_answer(example: Example, encode: Encode) -> int:
    """Tokens of the prompt and of the longest answer."""
    return len(encode(example.prompt)) + example.gen_tokens


def fitted(
    draft: Callable[[int], Draft],
    *,
    length: int,
    encode: Encode,
    task: Task,
    size: Callable[[Example, Encode], int] = prompt_and_answer,
) -> Example:
    """The example of `draft(length)` with as much filler as fits, up to a 400th of `length`.

    As `filled`, but it looks where a straight line through the sizes seen says: some five encodings of a long text
    instead of fifteen. Raises ValueError when no filler is still too long, naming a length whose own draft was seen to
    fit; as the drafts of two lengths differ, one a few tokens shorter may do too.
    """
    build, units = draft(length)
    bare = size(build(0), encode)
    if bare > length:
        least = bare
        while (needed := size(draft(least)[0](0), encode)) > least:
            least = needed
        raise ValueError(f"length={length} is too short for {task}, the smallest that works here is {least} tokens")
    low, low_size, high, high_size, best = 0, bare, units + 1, None, build(0)
    probe = 64
    while high - low > 1 and length - low_size > length // 400:
        middle = min(max(probe, low + 1), high - 1)
        example = build(middle)
        tokens = size(example, encode)
        if tokens <= length:
            low, low_size, best = middle, tokens, example
        else:
            high, high_size = middle, tokens
        rate = (low_size - bare) / low if high_size is None else (high_size - low_size) / (high - low)
        probe = low + int((length - low_size) / max(rate, 1e-3))
    return best
