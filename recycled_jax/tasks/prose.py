"""Filler text: sentences from a seeded grammar, or from a text of the user's."""

import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recycled_jax.tasks.words import ADJECTIVES, PEOPLE, PLACES, ROLES, THINGS, TIMES, VERBS

_PATTERNS = (
    "{person} {verb} the {adjective} {thing} near the {place}.",
    "The {role} {verb} a {thing} in the {adjective} {place}.",
    "On {time} {person} {verb} the {thing} of the {role}.",
    "{person} went from the {place} to the {place2} with a {adjective} {thing}.",
    "The {adjective} {role} and {person} {verb} every {thing} they had.",
    "There was a {adjective} {thing} behind the {place}, and the {role} {verb} it.",
    "Nobody in the {place} knew why the {role} {verb} the {adjective} {thing}.",
    "In the {time} the {place} was {adjective} and the {role} {verb} nothing.",
    "{person} said that the {role} {verb} the {thing} before {person2} came.",
    "When the {role} left the {place}, {person} {verb} the {thing} again.",
)
_POOLS = {
    "person": PEOPLE,
    "person2": PEOPLE,
    "role": ROLES,
    "place": PLACES,
    "place2": PLACES,
    "thing": THINGS,
    "adjective": ADJECTIVES,
    "verb": VERBS,
    "time": TIMES,
}


def generated_sentences(rng: np.random.Generator, count: int) -> list[str]:
    """`count` sentences of the grammar; no word of theirs is a key of `words.KEYS`, and no digit occurs."""
    return [
        pattern.format(**{name: pool[rng.integers(len(pool))] for name, pool in _POOLS.items()})
        for pattern in (_PATTERNS[i] for i in rng.integers(len(_PATTERNS), size=count))
    ]


def filler_sentences(rng: np.random.Generator, tokens: int, haystack: Sequence[str] | None = None) -> list[str]:
    """More sentences than `tokens` tokens can hold: those of `haystack` from a random one on, or generated ones."""
    if haystack is None:
        return generated_sentences(rng, max(1, tokens // 6))
    return _stretch(haystack, int(rng.integers(len(haystack))), tokens)


def _stretch(haystack: Sequence[str], start: int, length: int) -> list[str]:
    """Sentences from `start` on, more than `length` tokens can hold. One of more characters than an eighth of that is
    cut: a text without full stops is a single sentence, which would never fit."""
    width = max(128, length // 8)
    around = itertools.chain(haystack[start:], itertools.cycle(haystack))
    pieces = (
        piece
        for sentence in around
        for piece in ([sentence] if len(sentence) <= width else textwrap.wrap(sentence, width, break_on_hyphens=False))
    )
    return list(itertools.islice(pieces, max(1, length // 2)))


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, white space folded; a sentence ends at `.`, `!` or `?` before a space."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text).strip()) if sentence]


def read_haystack(path: str | Path, *, argument: str = "haystack") -> list[str]:
    """The sentences of a UTF-8 text file, which the user gave as `argument`.

    Raises FileNotFoundError when there is no such file, ValueError when it is not UTF-8 or holds no sentence.
    """
    try:
        sentences = split_sentences(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}={str(path)!r} is not UTF-8 text: byte {error.start} is invalid") from error
    if not sentences:
        raise ValueError(f"{argument}={str(path)!r} is empty, expected text with at least one sentence")
    return sentences
