"""Picture: how much longer a policy's answers are than the dense one's, task by task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from eval.finished.paired import output_tokens
from eval.report.pictures.panels import GUIDE, finish, new_panels
from eval.report.pictures.picture import Picture, Row
from eval.report.pictures.rows import about, cells, column, dense_cell, group
from eval.report.pictures.shown import Shown, in_rows
from recycled_jax.plots.style import DENSE_LEVEL


def output_length(shown: Sequence[Shown]) -> list[Picture]:
    """One for each length."""
    return [_picture(shown, length, part) for length, part in group(_rows(shown), "length").items()]


def _rows(shown: Sequence[Shown]) -> list[Row]:
    rows = []
    for s, key, cell in cells(shown):
        dense = None if cell.of_perplexity else dense_cell(s, shown, key)
        pairs = output_tokens(cell, dense) if dense else []
        if pairs:
            ours, theirs = (float(np.mean(tokens)) for tokens in zip(*pairs, strict=True))
            means = {"n": len(pairs), "tokens": ours, "dense_tokens": theirs, "ratio": ours / theirs}
            rows.append({**about(s, key), **means})
    return rows


def _picture(shown: Sequence[Shown], length: int, rows: list[Row]) -> Picture:
    tasks = list(dict.fromkeys(column(rows, "task")))
    own = in_rows(shown, rows)
    figure, [axes] = new_panels(1, width=6.2, height=1.0 + len(tasks) * max(0.35, 0.14 * len(own)))
    axes.axvline(1, **DENSE_LEVEL, gid=GUIDE)
    for place, s in enumerate(own):
        for row in (row for row in rows if row["label"] == s.label):
            y = tasks.index(row["task"]) + (place - (len(own) - 1) / 2) * 0.7 / len(own)
            axes.plot([row["ratio"]], [y], **_dot(s))
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel("mean output tokens ÷ dense's")
    handles = [Line2D([], [], **_dot(s), label=s.label) for s in own]
    finish(figure, [axes], [*handles, Line2D([], [], **DENSE_LEVEL, label="dense")], rows)
    caption = (
        "Right of 1 a policy writes more than the dense one on the same examples, and loses the time it has saved."
    )
    return Picture(f"output_length_{length}", f"Output length against dense, {length} tokens", caption, figure, rows)


def _dot(s: Shown) -> dict[str, Any]:
    """Without a line; open where the line would be dashed."""
    return s.style(ls="", ms=6, mfc=s.colour if s.dash == "-" else "white", mec=s.colour)
