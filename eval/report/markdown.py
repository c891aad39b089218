"""A report's tables as Markdown."""

from collections.abc import Sequence

from eval.finished.text import markdown_table
from eval.report.content import Content, Table


def markdown(content: Content) -> str:
    """Tables, then notes, then what has failed and what is missing."""
    parts = [f"# {content.title}"]
    for table in [*content.results, content.settings]:
        parts.append(f"## {table.title}")
        parts += table.notes
        for heading, rows in _sections(table):
            parts += [f"### {heading}"] if heading else []
            parts.append(markdown_table([table.first, *table.columns], rows))
    parts += [*content.notes, *(f"- {remark}" for remark in [*content.failures, *content.missing])]
    return "\n\n".join(parts) + "\n"


def _sections(table: Table) -> list[tuple[str, list[Sequence[str]]]]:
    sections: list[tuple[str, list[Sequence[str]]]] = []
    for row in table.rows:
        if len(row) == 1:
            sections.append((row[0], []))
        else:
            sections = sections or [("", [])]
            sections[-1][1].append(row)
    return sections
