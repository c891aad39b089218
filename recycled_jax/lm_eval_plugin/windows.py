"""Requests of lm-evaluation-harness as lists of tokens: what fits, what goes into a batch, where an answer ends.

Needs neither JAX nor the harness.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from recycled_jax.spelling import nearest

# Settings of a generation that we have, and those that we lack, with the values that switch them off.
_SETTINGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
_SWITCHED_OFF = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1, "min_p": 0}


class Row(NamedTuple):
    """Token ids to condition on, at least one, and those to score after them, at least one."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Settings:
    """What a request to generate asks for; greedy at `temperature` 0. Requests with equal ones can share a batch."""

    max_gen_toks: int
    temperature: float
    top_k: int | None
    top_p: float | None

    @classmethod
    def of(cls, asked: dict) -> "Settings":
        """From `generation_kwargs` as the harness normalises them, without those that are None.

        Raises ValueError for a setting that is not implemented and switched on, and for a number below its least.
        """
        for name, value in asked.items():
            if name not in _SETTINGS and _SWITCHED_OFF.get(name) != value:
                raise ValueError(f"generation setting {name}={value!r} is not implemented; {nearest(name, _SETTINGS)}")
        if asked["max_gen_toks"] < 1:
            raise ValueError(f"generation setting max_gen_toks={asked['max_gen_toks']} must be at least 1")
        if not asked["do_sample"]:
            return cls(asked["max_gen_toks"], 0.0, None, None)
        # transformers, whose names these are, takes top_k=0 for no limit and samples at 1
        return cls(
            asked["max_gen_toks"], float(asked.get("temperature", 1.0)), asked.get("top_k") or None, asked.get("top_p")
        )


@dataclass(frozen=True)
class Stops:
    """Where an answer ends: before the first of `ids` and before the first of `strings`, which may begin and end
    within tokens. `decode` gives the text of tokens."""

    strings: tuple[str, ...]
    ids: frozenset[int]
    decode: Callable[[Sequence[int]], str]

    def answer(self, tokens: Sequence[int]) -> str:
        text = self._text(tokens)
        return text[: min((text.find(string) for string in self.strings if string in text), default=len(text))]

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether further tokens can no longer change the answer."""
        if any(token in self.ids for token in tokens):
            return True
        text = self._text(tokens)
        return any(string in text for string in self.strings)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.decode(list(takewhile(lambda token: token not in self.ids, tokens)))


class Watch:
    """Follows a batch as it is generated: `generate`'s `on_block`, true once every row has reached a stop."""

    def __init__(self, stops: Sequence[Stops]):
        self._stops = stops
        self._tokens: list[list[int]] = [[] for _ in stops]
        self._reached = [False] * len(stops)

    def __call__(self, gained: list[list[int]]) -> bool:
        for row, (stops, new) in enumerate(zip(self._stops, gained, strict=True)):
            self._tokens[row] += new
            self._reached[row] = self._reached[row] or stops.reached(self._tokens[row])
        return all(self._reached)


def stop_strings(until: object) -> tuple[str, ...]:
    """The strings in a setting `until`: a string, a list, or None. Empty ones and None in the list ask for nothing.

    Raises ValueError for anything else.
    """
    strings = []
    for item in until if isinstance(until, list | tuple) else [until]:
        if not isinstance(item, str | None):
            raise ValueError(f"generation setting until holds {item!r}, expected strings")
        if item:
            strings.append(item)
    return tuple(strings)


def batches(keys: Sequence[Hashable], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of at most `size` requests with equal key, the longest first: alike lengths share a batch, and the one
    that needs most memory comes first."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    for indices in groups.values():
        indices.sort(key=lambda index: -lengths[index])
        for first in range(0, len(indices), size):
            yield indices[first : first + size]


def rounded(tokens: int, least: int) -> int:
    """The next length, from `tokens` on, of a few that are at most an eighth apart (and multiples of `least`): every
    length of an array is a program to compile."""
    step = max(least, 1 << max((tokens - 1).bit_length() - 4, 0))
    return -(-tokens // step) * step


def fit_prompt(prompt: list[int], *, max_gen_toks: int, max_length: int) -> tuple[list[int], bool]:
    """The end of the prompt that leaves room to generate, and whether tokens were lost at its beginning.

    Raises ValueError when the answer alone fills `max_length`.
    """
    if max_gen_toks >= max_length:
        raise ValueError(f"max_gen_toks={max_gen_toks} leaves no room for a prompt in max_length={max_length}")
    room = max_length - max_gen_toks
    return prompt[-room:], len(prompt) > room


def fit_row(context: list[int], continuation: list[int], *, max_length: int) -> tuple[Row, bool]:
    """The row whose tokens but the last, which is only scored, fit in `max_length`, and whether some were lost at the
    beginning.

    Raises ValueError for a continuation that is empty or too long to have a token before it.
    """
    if not 1 <= len(continuation) <= max_length:
        raise ValueError(
            f"a continuation has {len(continuation)} tokens, expected from 1 to max_length={max_length}; its context "
            f"has {len(context)}"
        )
    room = max_length + 1 - len(continuation)
    return Row(context[-room:], continuation), len(context) > room
