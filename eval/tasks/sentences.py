"""Prose as filler: cut at a word, measured in tokens, with facts between its sentences."""

from collections.abc import Sequence

import numpy as np

from recycled_jax.tasks.example import Encode

_BLOCK = 16  # sentences counted at once: a call of a tokenizer costs as much as a hundred characters


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
