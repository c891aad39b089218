"""How tables tell numbers and what tasks are."""

import math
from collections.abc import Sequence

NONE = "–"
RULER_STYLE = "RULER-style, not comparable with published RULER scores"


def ruler_style(task: str) -> bool:
    return task.startswith("rs_")


def shown(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def shown_bytes(count: float | None) -> str:
    """Three digits, decimal units."""
    if count is None:
        return NONE
    place = max(0, min(4, int(math.log10(count) // 3))) if count >= 1 else 0
    return f"{count / 1000**place:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[place]}"


def signed(value: float, digits: int = 1) -> str:
    """With a sign, but for a zero."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Padded, so that it reads as text too; the first column to the left, the others to the right."""
    cells = [[one.replace("|", "\\|") for one in line] for line in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = row
        padded = [first.ljust(widths[0]), *(one.rjust(width) for one, width in zip(others, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'-' * (widths[0] + 2)}|{''.join('-' * (width + 1) + ':|' for width in widths[1:])}"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
