"""Means over a cell."""

from collections.abc import Iterable

import numpy as np

from eval import perplexity as documents
from eval.finished.run import Cell


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def mean_score(cell: Cell) -> float | None:
    """Failed examples count 0."""
    return None if cell.of_perplexity else mean(one.score for one in cell.predictions.values())


def perplexity(cell: Cell) -> float | None:
    """Of all scored tokens, the first one included, which prefill predicts. Raises ValueError as `by_line`."""
    nats = _nats(cell)
    return documents.perplexity(list(nats.values())) if nats else None


def by_line(cell: Cell) -> dict[int, float]:
    """What is averaged, of each example: its score, or a document's mean nats.

    Raises ValueError for documents of different numbers of scored tokens, whose means would not weigh alike.
    """
    if cell.of_perplexity:
        return {line: float(np.mean(nll)) for line, nll in _nats(cell).items()}
    return {line: one.score for line, one in cell.predictions.items() if one.score is not None}


def _nats(cell: Cell) -> dict[int, tuple[float, ...]]:
    found = {line: one.nll for line, one in cell.predictions.items() if one.nll}
    if len({len(nll) for nll in found.values()}) > 1:
        raise ValueError(f"cell {cell.task} {cell.length} has documents of different numbers of scored tokens")
    return found
