"""Pictures of what a schedule does: how long selections lived, and the attention mass they recovered."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from recycled_jax.plots.selections import check_row
from recycled_jax.plots.style import (
    DENSE_LEVEL,
    GUIDE,
    add_colour_bar,
    draw_line,
    draw_unmet,
    finish,
    looks,
    marks,
    new_panels,
    set_title,
)
from recycled_jax.telemetry import Telemetry


def selection_lifetimes(figure: FigureBase, telemetries: Mapping[str, Telemetry], *, row: int = 0) -> list[Axes]:
    """For each policy, by its label, the age of every layer's selection at every decode step; in the last panel the
    effective stride of the layers, decode steps per refresh.

    A selection is 0 steps old when its layer has refreshed; that of the prompt's end is 1 step old in the first decode
    step. An open triangle stands at all the steps there were, where a layer never refreshed. Raises ValueError for a
    `row` that a telemetry does not have, and without any.
    """
    _check(telemetries, row)
    styles = looks(list(telemetries))
    *maps, strides = new_panels(figure, len(telemetries) + 1)
    by_label = {label: ages(one.refreshed[: one.steps[row], :, row]) for label, one in telemetries.items()}
    oldest = max(1, max(int(age.max(initial=0)) for age in by_label.values()))
    image = None
    for axes, (label, age) in zip(maps, by_label.items(), strict=True):
        steps, layers = age.shape
        edges = np.arange(steps + 1) + 0.5, np.arange(layers + 1) - 0.5
        image = axes.pcolormesh(*edges, age.T, cmap="viridis_r", vmin=0, vmax=oldest)
        axes.set(xlabel="decode step", ylabel="layer")
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        set_title(axes, label, size=9, colour=styles[label]["color"])
        telemetry = telemetries[label]
        stride = telemetry.effective_stride()[:, row]
        never = np.isinf(stride)
        shown = np.where(never, steps, stride)
        draw_line(strides, np.arange(layers), shown, styles[label])
        draw_unmet(strides, np.flatnonzero(never), shown[never], styles[label]["color"])
    strides.set(xlabel="layer", ylabel="decode steps per refresh", ylim=(0, None))
    strides.xaxis.set_major_locator(MaxNLocator(integer=True))
    set_title(strides, "effective stride", size=9)
    add_colour_bar(figure, image, maps, "age of the selection (steps)")
    finish(figure, [*maps, strides], marks(styles), "open triangle: no refresh in all the steps")
    return [*maps, strides]


def recovered_attention(figure: FigureBase, telemetries: Mapping[str, Telemetry], *, row: int = 0) -> list[Axes]:
    """Coverage, the share (0 to 1) of full attention's mass on what a selection held, of each policy by its label:
    against the decode step, mean over the layers, and against the layer, mean over the steps.

    Layers without a selection count nowhere. Raises ValueError for a `row` that a telemetry does not have, and when
    none has measured coverage (`coverage=True`).
    """
    _check(telemetries, row)
    found = {}
    for label, one in telemetries.items():
        of_row = one.coverage[: one.steps[row], :, row]
        selecting = np.flatnonzero(~np.isnan(of_row).all(axis=0))
        if len(selecting):
            found[label] = selecting, of_row[:, selecting]
    if not found:
        raise ValueError("telemetries hold no coverage, expected some measured with coverage=True")
    styles = looks(list(found))
    by_step, by_layer = panels = new_panels(figure, 2, sharey=True)
    for axes in panels:
        axes.axhline(1, **DENSE_LEVEL, gid=GUIDE)
        axes.set_ylim(0, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for label, (layers, coverage) in found.items():
        draw_line(by_step, np.arange(len(coverage)) + 1, coverage.mean(axis=1), styles[label])
        draw_line(by_layer, layers, coverage.mean(axis=0), styles[label])
    by_step.set(xlabel="decode step", ylabel="share of the attention mass")
    by_layer.set_xlabel("layer")
    set_title(by_step, "mean over layers", size=9)
    set_title(by_layer, "mean over steps", size=9)
    finish(figure, panels, [*marks(styles), Line2D([], [], **DENSE_LEVEL, label="full attention")])
    return panels


def ages(refreshed: Bool[np.ndarray, "steps layers"]) -> Int[np.ndarray, "steps layers"]:
    """Decode steps since each layer's last refresh; before the first one, since the end of the prompt."""
    steps = np.arange(1, len(refreshed) + 1)[:, None]
    return steps - np.maximum.accumulate(np.where(refreshed, steps, 0), axis=0)


def _check(telemetries: Mapping[str, Telemetry], row: int) -> None:
    if not telemetries:
        raise ValueError("telemetries is empty, expected at least one")
    for one in telemetries.values():
        check_row(row, len(one.steps))
