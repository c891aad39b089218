"""Questions over numbered documents, after the question answering of NVIDIA/RULER (scripts/data/synthetic/qa.py): the
documents are generated biographies of people who never lived, so that nothing has to be downloaded or was learned."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from eval.tasks.filling import Build, FilledTask, growing, joined, padding
from eval.tasks.word_lists import FIRST_NAMES, TOWNS, distinct, fresh, pick, surname, town
from recycled_jax.tasks.example import Encode, Example
from recycled_jax.tasks.words import PLACES, ROLES

HEADER = "Answer the question at the end from these documents.\n"
DOCUMENT = "\nDocument {number}\n{text}\n"
LIFE = (
    "{person} was born in {born} in {year}.",
    "{person} learned to be a {role} from {teacher}.",
    "In later years {first} moved to {moved} and lived by the {place}.",
)
# By hops: of the town of birth and of the later one.
QUESTIONS = {
    1: (
        ("In which town was {person} born?", "{person} was born in"),
        ("To which town did {person} move?", "{person} moved to"),
    ),
    2: (
        ("In which town was the teacher of {person} born?", "The teacher of {person} was born in"),
        ("To which town did the teacher of {person} move?", "The teacher of {person} moved to"),
    ),
}


@dataclass(frozen=True)
class Biographies(FilledTask):
    """A question about a person, or with `hops` 2 about that person's teacher, who has a document too. Of the other
    documents, `near` are always there and tell of people who share a surname with one of the two; more fill the length,
    the last of them cut where it ends. Everyone's teacher is the person of another document.

    Raises ValueError for parameters that no documents could be made of.
    """

    metric: ClassVar[str] = "part"
    hops: int = 1
    near: int = 0
    gen_tokens: int = 32

    def __post_init__(self) -> None:
        if self.hops not in (1, 2):
            raise ValueError(f"hops={self.hops} must be 1 or 2")
        if not 0 <= self.near <= len(FIRST_NAMES) // 2:
            raise ValueError(f"near={self.near} must be between 0 and {len(FIRST_NAMES) // 2}")
        if self.gen_tokens < 1:
            raise ValueError(f"gen_tokens={self.gen_tokens} must be at least 1")

    def draft(self, *, length: int, seed: int, index: int, encode: Encode) -> Build:
        rng = self.generator(length=length, seed=seed, index=index)
        kept = self.hops + self.near
        relation = int(rng.integers(2))
        order = int(rng.integers(2**62))
        surnames = distinct(lambda: surname(rng), self.hops + 1)  # of the question's people, and another
        first = [FIRST_NAMES[i] for i in rng.permutation(len(FIRST_NAMES))[: kept + 1]]
        people = [f"{name} {surnames[i % self.hops]}" for i, name in enumerate(first[:-1])]
        people.append(f"{first[-1]} {surnames[-1]}")
        towns = distinct(lambda: town(rng), 2 * kept)
        documents = [
            _life(rng, person, teacher, *places)
            for (person, teacher), places in zip(itertools.pairwise(people), itertools.batched(towns, 2), strict=True)
        ]
        answer = towns[2 * (self.hops - 1) + relation]
        question, prefix = (text.format(person=people[0]) for text in QUESTIONS[self.hops][relation])

        def stranger(name: str) -> bool:
            return name.split()[1] not in surnames

        def lives() -> Iterator[list[str]]:
            names, places = set(people), set(towns)
            person = people[-1]
            for _ in range((TOWNS - len(towns)) // 4):
                teacher = fresh(lambda: f"{pick(rng, FIRST_NAMES)} {surname(rng)}", names, free=stranger)
                yield _life(rng, person, teacher, *(fresh(lambda: town(rng), places) for _ in range(2)))
                person = teacher

        more = growing(lives())

        def build(units: int, pad: int) -> Example:
            others = more(math.ceil(units / len(LIFE)))
            texts = [" ".join(life) for life in itertools.chain(documents, _first(others, units))]
            places = np.random.default_rng([order, len(texts)]).permutation(len(texts))
            numbered = [DOCUMENT.format(number=i, text=texts[place]) for i, place in enumerate(places, 1)]
            return Example(
                index,
                joined([HEADER + "".join(numbered), padding(pad)], "\n"),
                f"\n{question}",
                f" {prefix}",
                (answer,),
                f" {answer}.",
                self.gen_tokens,
                {"documents": len(texts)},
            )

        return build


def _life(rng: np.random.Generator, person: str, teacher: str, born: str, moved: str) -> list[str]:
    names = {"person": person, "first": person.split()[0], "teacher": teacher, "born": born, "moved": moved}
    words = {"role": pick(rng, ROLES), "place": pick(rng, PLACES), "year": str(rng.integers(1700, 1950))}
    return [sentence.format(**names, **words) for sentence in LIFE]


def _first(lives: Sequence[Sequence[str]], sentences: int) -> Iterator[Sequence[str]]:
    """The first so many sentences, life by life."""
    for life in lives:
        if sentences <= 0:
            return
        yield life[:sentences]
        sentences -= len(life)
