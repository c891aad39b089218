"""Pictures of what a schedule does: how often it refreshes, how far selections change, and what they hold with age."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from eval.finished.means import mean
from eval.finished.run import Cell
from eval.report.pictures.lines import Lines
from eval.report.pictures.picture import Picture, Row
from eval.report.pictures.rows import about, cells, column
from eval.report.pictures.shown import Shown
from recycled_jax.plots.style import draw_unmet


def stride_by_layer(shown: Sequence[Shown]) -> list[Picture]:
    rows = []
    for s, key, cell in cells(shown):
        steps = mean(one.gen_tokens - 1 for one in cell.predictions.values() if one.gen_tokens)
        if s.dense or steps is None:
            continue
        for layer, stride in enumerate(cell.effective_stride):
            never = stride is None
            at = {"layer": layer, "stride": stride, "steps": steps, "shown": steps if never else stride}
            rows.append({**about(s, key), **at, "no_refresh": never})
    return [] if all(row["no_refresh"] for row in rows) else _STRIDES.draw(shown, rows)


def _mark_without_refresh(axes: Axes, s: Shown, rows: Sequence[Row]) -> None:
    never = [row for row in rows if row["no_refresh"]]
    draw_unmet(axes, column(never, "layer"), column(never, "shown"), s.colour)


_STRIDES = Lines(
    "stride_by_layer",
    "Effective stride per layer",
    "Decode steps per refresh, as observed. An open triangle: no refresh in all the steps, so the stride is longer.",
    x=("layer", "layer"),
    y=("shown", "steps per refresh"),
    whole=True,
    bottom=0,
    extra=_mark_without_refresh,
)


def overlap_by_layer(shown: Sequence[Shown]) -> list[Picture]:
    rows = [
        {**about(s, key), "layer": layer, "overlap": overlap}
        for s, key, cell in cells(shown)
        if cell.metrics
        for layer, overlap in enumerate(cell.metrics.overlap)
        if overlap is not None
    ]
    return _OVERLAPS.draw(shown, rows)


_OVERLAPS = Lines(
    "overlap_by_layer",
    "Overlap of selections per layer",
    "Share of the slots of two successive selections that both have (intersection over union), at refreshes.",
    x=("layer", "layer"),
    y=("overlap", "overlap"),
    whole=True,
    bottom=0,
    top=1.03,
)


def coverage_by_age(shown: Sequence[Shown]) -> list[Picture]:
    rows = []
    for s, key, cell in cells(shown):
        for age, of_layers in sorted(_coverage(cell).items()):
            means = [value for value in map(mean, of_layers.values()) if value is not None]
            spread = {"coverage": mean(means), "low": min(means), "high": max(means), "layers": len(means)}
            rows.append({**about(s, key), "mode": "mask", "steps_since_refresh": age, **spread})
    return _COVERAGES.draw(shown, rows)


def _coverage(cell: Cell) -> dict[int, dict[int, list[float]]]:
    """All that was measured, by steps since the refresh, then by layer."""
    found: dict[int, dict[int, list[float]]] = {}
    for layer in (layer for layers in cell.telemetry.values() for layer in layers):
        for age, value in enumerate(layer.coverage_by_age):
            if value is not None:
                found.setdefault(age, {}).setdefault(layer.layer, []).append(value)
    return found


_COVERAGES = Lines(
    "coverage_by_age",
    "Coverage against steps since the refresh",
    "Attention mass that the selection holds, which falls as it ages. Mean over examples and layers; bands from the "
    "lowest layer to the highest. Measured with dense scores: the pass is in mask mode.",
    x=("steps_since_refresh", "steps since the refresh"),
    y=("coverage", "coverage"),
    whole=True,
    top=1.03,
)
