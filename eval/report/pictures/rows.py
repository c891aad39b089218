"""The rows of pictures: from the cells of runs, and in groups."""

from collections.abc import Iterable, Sequence
from typing import Any

from eval.finished.paired import dense_of
from eval.finished.run import Cell
from eval.report.pictures.picture import Row
from eval.report.pictures.shown import Shown

Key = tuple[str, int]  # task and length


def cells(shown: Sequence[Shown]) -> list[tuple[Shown, Key, Cell]]:
    """By task and length, then in the order of the runs."""
    keys = sorted({key for s in shown for key in s.run.cells})
    return [(s, key, s.run.cells[key]) for key in keys for s in shown if key in s.run.cells]


def about(s: Shown, key: Key) -> Row:
    """What every row of a cell begins with."""
    place = {"device": s.run.device, "mode": s.run.config.mode}
    return {"label": s.label, "policy": s.family, "task": key[0], "length": key[1], **place}


def dense_cell(s: Shown, shown: Sequence[Shown], key: Key) -> Cell | None:
    """The dense policy's, of the same examples; None for the dense policy itself."""
    dense = dense_of(s.run, (other.run for other in shown), key)
    return dense.cells[key] if dense else None


def group(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    """By the value of a field, or the tuple of the values of several."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[names[0]] if len(names) == 1 else tuple(row[n] for n in names), []).append(row)
    return groups


def column(rows: Iterable[Row], name: str) -> list[Any]:
    return [row[name] for row in rows]
