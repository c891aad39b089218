"""What a generated task makes: an example, from a random generator of its own, filled up to a length."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# From text to tokens as the model sees them, special tokens and a template's included.
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Example:
    """One question over one document. The prompt is `context + question + answer_prefix`; `outputs` are the references
    of the task's metric, `gold` is an answer that it counts as fully right; `gen_tokens` is how many tokens an answer
    may have. `meta` is what the metric or a report needs beside them, as JSON."""

    index: int
    context: str
    question: str
    answer_prefix: str
    outputs: tuple[str, ...]
    gold: str
    gen_tokens: int
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.answer_prefix


def generator(**identity: Any) -> np.random.Generator:
    """The random numbers of one example: seeded with the first 8 bytes of SHA-256 over the canonical JSON of what it is
    (task, version, parameters, length, seed, index), so that they never depend on how many examples are made."""
    canonical = json.dumps(identity, sort_keys=True)
    return np.random.default_rng(int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big"))


def filled(build: Callable[[int], Example], *, units: int, length: int, encode: Encode, task: str) -> Example:
    """`build(n)` for the largest n up to `units` whose prompt and answer fit into `length` tokens.

    More units of filler make a longer prompt. Raises ValueError when not even `build(0)` fits, naming the smallest
    length that works.
    """

    def tokens(example: Example) -> int:
        return len(encode(example.prompt)) + example.gen_tokens

    least = tokens(build(0))
    if least > length:
        raise ValueError(f"length={length} is too short for {task}, the smallest that works here is {least} tokens")
    low, high = 0, units
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(build(middle)) <= length else (low, middle - 1)
    return build(low)
