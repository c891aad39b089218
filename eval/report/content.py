"""What a report says, before it is written as a page or as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.report.pictures.picture import Picture


@dataclass(frozen=True)
class Table:
    """`groups` are questions and their columns. A row of one text is a heading within the table."""

    title: str
    first: str
    groups: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    prose: bool = False  # texts, not numbers

    @property
    def columns(self) -> list[str]:
        """All but the first."""
        return [column for _, columns in self.groups for column in columns]


@dataclass(frozen=True)
class Content:
    """`results` are tables; `failures` and `missing` have a sentence for each failed cell and each picture left out."""

    title: str
    lead: str
    results: Sequence[Table]
    settings: Table
    notes: Sequence[str]
    pictures: Sequence[Picture]
    failures: Sequence[str]
    missing: Sequence[str]
