"""Pictures of where a needle is found: heat maps of score by depth and length, and of the difference from dense."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.finished.means import mean
from eval.finished.paired import same_examples
from eval.finished.run import Cell
from eval.report.pictures.panels import finish, new_panels
from eval.report.pictures.picture import Picture, Row
from eval.report.pictures.rows import about, cells, dense_cell, group
from eval.report.pictures.shown import Shown, in_rows
from recycled_jax.plots.style import INK, add_colour_bar, set_title


@dataclass(frozen=True)
class _Map:
    """`field` of the rows is what is shown, in colours between the `limits`."""

    field: str
    title: str
    caption: str
    colours: str
    limits: tuple[float, float]
    scale: str  # what its bar says

    def text(self, value: float) -> str:
        return f"{value:.0f}" if self.field == "score" else f"{value:+.0f}".replace("-", "−").replace("+0", "0")

    def on_dark(self, value: float) -> bool:
        place = (value - self.limits[0]) / (self.limits[1] - self.limits[0])
        return place < 0.55 if self.field == "score" else abs(place - 0.5) > 0.32


_SCORES = _Map(
    "score",
    "Needle: score by depth and length",
    "Mean score (0 to 100) of the examples at a depth, in percent of the context from its beginning.",
    "viridis",
    (0.0, 100.0),
    "score",
)


def _differences(largest: float) -> _Map:
    return _Map(
        "difference",
        "Needle: difference from dense",
        "Points of score above (blue) or below (red) the dense policy on the same examples.",
        "RdBu",
        (-largest, largest),
        "points from dense",
    )


def needle_maps(shown: Sequence[Shown]) -> list[Picture]:
    """Two for each task that has several depths; without a dense run, one."""
    result = []
    for task, rows in group(_rows(shown), "task").items():
        if len({row["depth"] for row in rows}) < 2:
            continue
        compared = [row for row in rows if row["difference"] is not None]
        maps = [(_SCORES, rows)]
        if compared:
            maps.append((_differences(max(20, *(abs(row["difference"]) for row in compared))), compared))
        for of, part in maps:
            figure = _draw(shown, part, of)
            result.append(Picture(f"needle_{of.field}_{task}", f"{of.title}, {task}", of.caption, figure, part))
    return result


def _rows(shown: Sequence[Shown]) -> list[Row]:
    rows = []
    for s, key, cell in cells(shown):
        by_depth = _scores_by_depth(cell)
        dense = dense_cell(s, shown, key) if by_depth else None
        for depth, scores in by_depth.items():
            row = {**about(s, key), "depth": depth, "n": len(scores), "score": mean(scores)}
            rows.append(row | {"difference": _difference(cell, dense, depth) if dense else None})
    return rows


def _scores_by_depth(cell: Cell) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for one in cell.predictions.values():
        if one.score is not None and isinstance(one.meta.get("depth"), int | float):
            found.setdefault(one.meta["depth"], []).append(one.score)
    return found


def _difference(cell: Cell, dense: Cell, depth: float) -> float | None:
    pairs = [(a.score, b.score) for a, b in same_examples(cell, dense) if a.meta.get("depth") == depth]
    return mean(a - b for a, b in pairs if a is not None and b is not None)


def _draw(shown: Sequence[Shown], rows: Sequence[Row], of: _Map) -> Figure:
    """A panel for each run."""
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    own = in_rows(shown, rows)
    width, height = max(2.7, 0.5 * len(lengths) + 1.2), max(2.0, 0.26 * len(depths) + 0.9)
    figure, panels = new_panels(len(own), width=width, height=height)
    images = []
    for axes, s in zip(panels, own, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row in (row for row in rows if row["label"] == s.label):
            grid[depths.index(row["depth"]), lengths.index(row["length"])] = row[of.field]
        images.append(_panel(axes, grid, of))
        axes.set_xticks(
            np.arange(len(lengths)) + 0.5, [f"{n:,}" for n in lengths], rotation=45 if len(lengths) > 4 else 0
        )
        axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:g} %" for depth in depths])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set(xlabel="length (tokens)", ylabel="depth")
        set_title(axes, s.label, size=9, colour=s.colour)
    add_colour_bar(figure, images[-1], panels, of.scale)
    finish(figure, panels, [], rows)
    return figure


def _panel(axes: Axes, grid: np.ndarray, of: _Map) -> Any:
    """Colours and their numbers; depths down, lengths across, NaN where nothing was asked."""
    low, high = of.limits
    image = axes.pcolormesh(np.ma.masked_invalid(grid), cmap=of.colours, vmin=low, vmax=high, ec="white", lw=0.8)
    for y, x in zip(*np.nonzero(~np.isnan(grid)), strict=True):
        value = float(grid[y, x])
        colour = "white" if of.on_dark(value) else INK
        axes.text(x + 0.5, y + 0.5, of.text(value), ha="center", va="center", fontsize=7.5, color=colour)
    return image
