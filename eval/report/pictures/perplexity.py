"""Picture: by how much a policy's perplexity exceeds the dense one's as the answer goes on."""

from collections.abc import Sequence

import numpy as np

from eval.finished.paired import same_examples
from eval.metrics import interval
from eval.report.pictures.lines import Lines
from eval.report.pictures.picture import Picture, Row
from eval.report.pictures.rows import about, cells, dense_cell
from eval.report.pictures.shown import Shown

BIN = 16  # generated positions of one point


def perplexity_by_position(shown: Sequence[Shown]) -> list[Picture]:
    return _LINES.draw(shown, _rows(shown))


def _rows(shown: Sequence[Shown]) -> list[Row]:
    rows = []
    for s, key, cell in cells(shown):
        dense = dense_cell(s, shown, key) if cell.of_perplexity else None
        pairs = same_examples(cell, dense) if dense else []
        more = np.array([np.subtract(ours.nll, theirs.nll) for ours, theirs in pairs if ours.nll and theirs.nll])
        for first in range(0, more.shape[1] if more.size else 0, BIN):
            by_document = more[:, first : first + BIN].mean(axis=1)
            low, high = interval(by_document.tolist())
            last = min(first + BIN, more.shape[1]) - 1
            place = {"from": first, "to": last, "documents": len(more), "position": (first + last) / 2}
            ratio, low, high = (float(np.exp(nats)) for nats in (by_document.mean(), low, high))
            rows.append({**about(s, key), **place, "ratio": ratio, "low": low, "high": high})
    return rows


_LINES = Lines(
    "perplexity_by_position",
    "Perplexity ratio against generated position",
    f"Perplexity over the dense policy's, in bins of {BIN} generated tokens, paired by document and position: 1 is no "
    "loss. Bands: 95 % bootstrap over documents. Position 0 comes from prefill.",
    x=("position", "generated position (tokens)"),
    y=("ratio", "perplexity ÷ dense"),
    level=1,
)
