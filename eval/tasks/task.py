"""What a task is."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from recycled_jax.tasks.example import Encode, Example, generator
from recycled_jax.tasks.prose import read_haystack


@dataclass(frozen=True)
class Haystack:
    """The sentences of a text to hide facts in, known by the digest of its file."""

    sha256: str
    sentences: tuple[str, ...] = field(repr=False, compare=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of a UTF-8 text file. Raises as `prose.read_haystack`."""
        return cls(hashlib.sha256(path.read_bytes()).hexdigest(), tuple(read_haystack(path)))


@dataclass(frozen=True)
class Task(ABC):
    """Makes examples. Derived frozen dataclasses have the task's parameters as fields: numbers, strings, or a
    `Haystack`. What they make depends on those, the length, the seed and the index alone."""

    metric: ClassVar[str]  # a name in `eval.metrics.METRICS`
    version: ClassVar[int] = 1  # of wording and rules; part of the seed

    @abstractmethod
    def example(self, *, length: int, seed: int, index: int, encode: Encode) -> Example:
        """Example `index`, whose prompt and answer fill at most `length` tokens.

        Raises ValueError when not even the smallest fits, naming the smallest length that works.
        """

    @property
    def takes_haystack(self) -> bool:
        """Whether it hides facts in prose, which may be a user's."""
        return any(field.name == "haystack" for field in fields(self))

    @property
    def questions(self) -> int:
        """Of one example: more than one are its turns, told in `meta["turns"]`."""
        return 1

    def generator(self, *, length: int, seed: int, index: int) -> np.random.Generator:
        """The random numbers of one example."""
        name, version = type(self).__name__, self.version
        return generator(task=name, version=version, params=self.params, length=length, seed=seed, index=index)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as JSON; a haystack is its digest."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.sha256 if isinstance(v, Haystack) else v for name, v in values.items()}
