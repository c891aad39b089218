"""What a generated task makes: an example, from a random generator of its own."""

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
