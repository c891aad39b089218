"""Which words are the most frequent? After NVIDIA/RULER (scripts/data/synthetic/common_words_extraction.py and
freq_words_extraction.py): a numbered list of words, and a text of coded words whose counts follow Zipf's law."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from eval.tasks.filling import Build, FilledTask, growing, joined, padding
from eval.tasks.word_lists import NOUNS, PAIRS, code, distinct, fresh, pair
from recycled_jax.tasks.example import Encode, Example

LIST_HEADER = "Count how often each word stands in this list.\n"
LIST_QUESTION = "\nWhich {count} words stand in the list most often?"
LIST_PREFIX = " The {count} words that stand in it most often are:"
SOLVED = "{text}{exchange}\n\nNow the same for another list.\n"

CODED_HEADER = "Count how often each word stands in this coded text. The dots mean nothing.\n"
CODED_QUESTION = "\nLeaving out the dots, which {count} words stand in the coded text most often?"
CODED_PREFIX = " The {count} words that stand in it most often are:"
DOTS = "..."


@dataclass(frozen=True)
class Counts:
    """How often the asked words and the others stand in the list, and in that of the solved example, which has so many
    different words."""

    common: int
    other: int
    solved_words: int
    solved_common: int
    solved_other: int


LONG_FROM = 4096  # tokens
LONG = Counts(common=30, other=3, solved_words=40, solved_common=10, solved_other=3)
SHORT = Counts(common=6, other=1, solved_words=20, solved_common=3, solved_other=1)


@dataclass(frozen=True)
class CommonWords(FilledTask):
    """The `num_cw` words that stand in a numbered list `freq_cw` times each are asked; others stand there `freq_ucw`
    times. None is 30 and 3, or 6 and 1 below 4096 tokens. With `solved`, a short list and its answer stand in front.

    The asked words are nouns; so are the others until nouns run out and pairs of adjective and noun follow.
    Raises ValueError for parameters that no list could be made of.
    """

    metric: ClassVar[str] = "all"
    num_cw: int = 10
    freq_cw: int | None = None
    freq_ucw: int | None = None
    solved: bool = True
    gen_tokens: int = 120

    def __post_init__(self) -> None:
        if not 1 <= self.num_cw <= SHORT.solved_words:
            raise ValueError(f"num_cw={self.num_cw} must be between 1 and {SHORT.solved_words}")
        if self.gen_tokens < 1:
            raise ValueError(f"gen_tokens={self.gen_tokens} must be at least 1")
        for length in (1, LONG_FROM):
            counts = self._counts(length)
            if not 1 <= counts.other < counts.common:
                raise ValueError(f"freq_ucw={counts.other} must be at least 1 and below freq_cw={counts.common}")

    def _counts(self, length: int) -> Counts:
        counts = LONG if length >= LONG_FROM else SHORT
        common = counts.common if self.freq_cw is None else self.freq_cw
        return replace(counts, common=common, other=counts.other if self.freq_ucw is None else self.freq_ucw)

    def draft(self, *, length: int, seed: int, index: int, encode: Encode) -> Build:
        rng = self.generator(length=length, seed=seed, index=index)
        counts = self._counts(length)
        nouns = [NOUNS[i] for i in rng.permutation(len(NOUNS))]
        common: list[str] = []
        for noun in nouns:
            if len(common) < self.num_cw and len(noun) > 3 and not any(noun in c or c in noun for c in common):
                common.append(noun)

        def free(word: str) -> bool:
            return not any(asked in word for asked in common)

        nouns = [noun for noun in nouns if free(noun)]
        shown = nouns[: counts.solved_words] if self.solved else []
        nouns = nouns[len(shown) :]
        order = int(rng.integers(2**62))

        def shuffled(words: Sequence[str]) -> str:
            places = np.random.default_rng([order, len(words)]).permutation(len(words))
            return " ".join(f"{number}. {words[place]}" for number, place in enumerate(places, 1))

        def exchange(words: Sequence[str]) -> tuple[str, str, str]:
            count = len(words)
            return LIST_QUESTION.format(count=count), LIST_PREFIX.format(count=count), f" {', '.join(words)}"

        header = LIST_HEADER
        if shown:
            entries = shown[: self.num_cw] * counts.solved_common + shown[self.num_cw :] * counts.solved_other
            header += SOLVED.format(text=shuffled(entries), exchange="".join(exchange(shown[: self.num_cw])))

        def words() -> Iterator[str]:
            taken: set[str] = set()
            yield from nouns
            for _ in range(PAIRS // 3):
                yield fresh(lambda: pair(rng), taken, free=free)

        others = growing(words())

        def build(units: int, pad: int) -> Example:
            text = shuffled(common * counts.common + others(units) * counts.other)
            question, prefix, answer = exchange(common)
            context = joined([padding(pad), header + text], "\n")
            return Example(index, context, question, prefix, tuple(common), answer, self.gen_tokens)

        return build


ASKED_RANKS = slice(1, 4)  # of the coded words; the most frequent one is dots


@dataclass(frozen=True)
class CodedWords(FilledTask):
    """In N coded words of `letters` letters, that of rank i stands int(N·i^−alpha / ζ(alpha)) times, up to rank
    `vocabulary`, by default (length − 50) // 50. Rank 1 is a row of dots; ranks 2 to 4 are asked.

    Where rounding made a lower rank as frequent as rank 4, it stands there once less often.
    Raises ValueError for parameters that no text could be made of.
    """

    metric: ClassVar[str] = "all"
    alpha: float = 2.0
    letters: int = 6
    vocabulary: int | None = None
    gen_tokens: int = 50

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 4:
            raise ValueError(f"alpha={self.alpha} must be above 1 and at most 4")
        if not 4 <= self.letters <= 32:
            raise ValueError(f"letters={self.letters} must be between 4 and 32")
        if self.vocabulary is not None and not ASKED_RANKS.stop <= self.vocabulary <= 10_000:
            raise ValueError(f"vocabulary={self.vocabulary} must be between {ASKED_RANKS.stop} and 10000")
        if self.gen_tokens < 1:
            raise ValueError(f"gen_tokens={self.gen_tokens} must be at least 1")

    def draft(self, *, length: int, seed: int, index: int, encode: Encode) -> Build:
        rng = self.generator(length=length, seed=seed, index=index)
        size = min(max((length - 50) // 50, ASKED_RANKS.stop), 10_000) if self.vocabulary is None else self.vocabulary
        words = [DOTS, *distinct(lambda: code(rng, self.letters), size - 1)]
        asked = tuple(words[ASKED_RANKS])
        shares = np.arange(1, size + 1) ** -self.alpha / _zeta(self.alpha)
        # the fewest words of which the last one asked stands there twice
        start = int(np.ceil(2 / shares[ASKED_RANKS.stop - 1]))
        order = int(rng.integers(2**62))
        count = len(asked)

        def build(units: int, pad: int) -> Example:
            times = (shares * (start + units)).astype(int)
            last = ASKED_RANKS.stop
            times[last:] = np.minimum(times[last:], times[last - 1] - 1)
            which = np.repeat(np.arange(size), times)
            text = [words[i] for i in np.random.default_rng([order, len(which)]).permutation(which)]
            return Example(
                index,
                CODED_HEADER + " ".join([*text, *[DOTS] * pad]),
                CODED_QUESTION.format(count=count),
                CODED_PREFIX.format(count=count),
                asked,
                f" {', '.join(asked)}",
                self.gen_tokens,
            )

        return build


def _zeta(alpha: float) -> float:
    """Riemann's, by the first thousand terms and the integral over the others (Euler and Maclaurin)."""
    terms = np.arange(1.0, 1001)
    return float((terms**-alpha).sum() + 1000 ** (1 - alpha) / (alpha - 1) - 0.5 * 1000**-alpha)
