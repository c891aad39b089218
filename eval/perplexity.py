"""Perplexity by generated position: the last tokens of pieces of text, one decode step each (RefreshKV, section 3)."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from recycled_jax.tasks.prose import generated_sentences

SCORED = 256  # tokens
_GENERATED = 60_000  # sentences, about 700,000 tokens, where no documents are given


@dataclass(frozen=True)
class Documents:
    """Token ids of texts, and the digests that tell them from others. A piece never crosses from one to the next."""

    tokens: tuple[np.ndarray, ...] = field(repr=False, compare=False)
    digests: tuple[str, ...]
    begin: tuple[int, ...]  # the special tokens before a text

    @classmethod
    def read(cls, paths: Sequence[str], encode: Callable[[str], Sequence[int]], *, seed: int) -> Self:
        """Of text files, or JSON Lines with the field `text`; generated prose when there are none.

        Raises OSError for a file that cannot be read, ValueError for one that is not UTF-8 or lacks the field.
        """
        texts: list[str] = []
        for path in map(Path, paths):
            texts += _texts(path)
        if not paths:
            texts = [" ".join(generated_sentences(np.random.default_rng(seed), _GENERATED))]
        begin = tuple(encode(""))
        tokens = tuple(np.asarray(encode(text), np.int32)[len(begin) :] for text in texts)
        return cls(tokens, tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts), begin)

    def pieces(self, length: int, scored: int, wanted: int) -> int:
        """How many pieces of `length` tokens there are, `wanted` at most.

        Raises ValueError where there is none, or no token would stand before those that are `scored`.
        """
        if not 1 <= scored < length:
            raise ValueError(f"scored={scored} must be at least 1 and below the length {length}")
        found = sum(self._of_document(length))
        if not found:
            longest = max(map(len, self.tokens), default=0) + len(self.begin)
            raise ValueError(f"documents have {longest} tokens at most, expected {length} in one of them")
        return min(found, wanted)

    def piece(self, line: int, length: int) -> tuple[int, ...]:
        """Piece `line`: the documents' stretches of `length` tokens one after the other, none twice; each begins with
        the special tokens."""
        body = length - len(self.begin)
        for document, count in zip(self.tokens, self._of_document(length), strict=True):
            if line < count:
                return (*self.begin, *document[line * body : (line + 1) * body].tolist())
            line -= count
        raise ValueError(f"line={line} is behind the last piece")

    def _of_document(self, length: int) -> list[int]:
        return [len(document) // (length - len(self.begin)) for document in self.tokens]


def _texts(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"documents: {str(path)!r} is not UTF-8 text: byte {error.start} is invalid") from error
    if path.suffix != ".jsonl":
        return [content]
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            texts.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object with 'text'") from error
    return texts


def perplexity(nll: Sequence[Sequence[float]], *, first: int = 0) -> float:
    """exp of the mean negative log-likelihood (nats) over documents and their tokens from `first` on."""
    return float(np.exp(np.mean([row[first:] for row in nll])))
