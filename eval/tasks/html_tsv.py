"""A table of a web page to be written as tab-separated values, after LongProc (princeton-pli/LongProc,
html_to_tsv_evaluator.py); page and wording are ours."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from eval.tasks.filling import Draft, fitted
from eval.tasks.html_page import KINDS, NAME, TOPICS, Kind, names, page_html, row_html, table_html, tsv
from eval.tasks.sentences import Filler
from eval.tasks.task import Haystack, Task
from recycled_jax.tasks.example import Encode, Example
from recycled_jax.tasks.prose import filler_sentences

QUESTION = (
    '\n\nAbove is the source of a web page. Write its table "{topic}" as tab-separated values: a header line with '
    "{columns}, then one line for each row{filter}, in the order of the page, text only, without tags. Put the lines "
    "into a code fence marked tsv.\n"
)
FILTER = " whose {heading} {condition}"
PREFIX = "Answer:\n"
GOLD = "```tsv\n{tsv}\n```"

FEW_ROWS = 10  # at most, of a table that is not the target

Row = tuple[str, ...]


@dataclass(frozen=True)
class HtmlTsv(Task):
    """The target is one of `tables` tables of the same `columns` columns. It has as many rows as an answer of
    `out_level` tokens can hold, the other tables have fewer. With `filter` one, only rows that meet a condition belong
    to the answer, and half as many others stand between them. Prose, of the seeded grammar when `haystack` is None,
    fills the page up to the length asked: the paper's means are 18K, 35K and 38K for levels of 512, 2048 and 8192.

    An answer may have 1.25 × `out_level` tokens. `outputs` is the answer without its fence.
    """

    metric: ClassVar[str] = "row_f1"

    columns: int = 3
    out_level: int = 512
    tables: int = 4
    filter: Literal["none", "one"] = "none"
    haystack: Haystack | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.columns <= len(KINDS) + 1:
            raise ValueError(f"columns={self.columns} must be between 2 and {len(KINDS) + 1}")
        if not 1 <= self.tables <= len(TOPICS):
            raise ValueError(f"tables={self.tables} must be between 1 and {len(TOPICS)}")
        if self.filter not in ("none", "one"):
            raise ValueError(f"filter={self.filter!r} must be 'none' or 'one'")

    def example(self, *, length: int, seed: int, index: int, encode: Encode) -> Example:
        """As `Task.example`; `meta` has the number of `rows` and `columns` of the answer.

        Raises ValueError also when `out_level` tokens cannot hold a header and one row.
        """

        def draft(length: int) -> Draft:
            rng = self.generator(length=length, seed=seed, index=index)
            kinds = [KINDS[i] for i in rng.permutation(len(KINDS))[: self.columns - 1]]
            headings = [NAME, *(kind.heading for kind in kinds)]
            rows = _rows(kinds, rng)
            asked, wanted = "", None
            if self.filter == "one":
                asked, wanted = _condition(kinds, rng)
            right = longest_answer(headings, filter(wanted, rows), self.out_level, encode)
            wrong = list(itertools.islice(itertools.filterfalse(wanted, rows), len(right) // 2)) if wanted else []
            topics = [TOPICS[i] for i in rng.permutation(len(TOPICS))[: self.tables]]
            target = int(rng.integers(self.tables))
            most = max(2, min(FEW_ROWS, len(right) - 1))
            bodies = [list(itertools.islice(rows, int(rng.integers(2, most + 1)))) for _ in topics]
            bodies[target] = _mixed(right, wrong, rng)
            tables = [
                table_html(topic, headings, [row_html(row, int(rng.integers(8))) for row in body])
                for topic, body in zip(topics, bodies, strict=True)
            ]
            question = QUESTION.format(topic=topics[target], columns=", ".join(headings), filter=asked)
            answer = tsv(headings, right)
            prose = Filler(filler_sentences(rng, length, self.haystack and self.haystack.sentences))
            gen_tokens = math.ceil(1.25 * self.out_level)
            meta = {"rows": len(right), "columns": self.columns}

            def build(words: int) -> Example:
                page = page_html(topics, tables, prose.first(words))
                return Example(index, page, question, PREFIX, (answer,), GOLD.format(tsv=answer), gen_tokens, meta)

            return build, prose.words

        return fitted(draft, length=length, encode=encode, task=self)


def longest_answer(headings: Sequence[str], rows: Iterable[Row], tokens: int, encode: Encode) -> list[Row]:
    """The first rows, as many as an answer of `tokens` tokens can hold. Raises ValueError when it cannot hold one."""
    special = len(encode(""))

    def size(taken: Sequence[Row]) -> int:
        return len(encode(GOLD.format(tsv=tsv(headings, taken)))) - special

    taken: list[Row] = []
    rest = tokens
    for row in rows:
        taken.append(row)
        rest -= len(encode("\t".join(row))) - special
        if rest <= 0:
            break
    while (needed := size(taken)) > tokens:  # line ends and the header are in this size
        if len(taken) == 1:
            raise ValueError(f"out_level={tokens} is too small for a header and a row, which need {needed} tokens")
        taken.pop()
    return taken


def _rows(kinds: Sequence[Kind], rng: np.random.Generator) -> Iterator[Row]:
    """Random rows without end, no two with the same name before all names are used."""
    return ((name, *(kind.cell(rng) for kind in kinds)) for name in names(rng))


def _condition(kinds: Sequence[Kind], rng: np.random.Generator) -> tuple[str, Callable[[Row], bool]]:
    """Words to put behind "each row", and whether a row meets them."""
    column = int(rng.integers(len(kinds)))
    words, meets = kinds[column].condition(rng)
    return FILTER.format(heading=kinds[column].heading, condition=words), lambda row: meets(row[1 + column])


def _mixed(right: Sequence[Row], wrong: Sequence[Row], rng: np.random.Generator) -> list[Row]:
    """Both in random places, each in its own order."""
    places = rng.permutation(len(right) + len(wrong))
    ordered = [*np.sort(places[: len(right)]).tolist(), *np.sort(places[len(right) :]).tolist()]
    return [row for _, row in sorted(zip(ordered, [*right, *wrong], strict=True))]
