"""Picture: which positions each layer's selection held, step after step."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from recycled_jax.plots.recording import Recording
from recycled_jax.plots.style import GUIDE, INK, add_colour_bar, finish, new_panels, set_title

BINS = 96  # of neighbouring positions; a pixel can hardly show one of thousands
PANELS = 8
_MARKED = "#D55E00"


def selected_positions(
    figure: FigureBase,
    recording: Recording,
    *,
    row: int = 0,
    layers: Sequence[int] | None = None,
    marked: Mapping[str, int] | None = None,
    bins: int = BINS,
) -> list[Axes]:
    """A panel for each of the `layers` (default: all, of more than 8 every so many): decode steps to the right,
    positions in tokens upward.

    The colour is the share of a bin's slots that the selection held, mean over its heads; positions that did not exist
    yet are blank. Triangles are refreshes. `marked` are positions with a short text beside them: where a fact stands,
    for instance. Raises ValueError for a `row` or a layer that the recording does not have.
    """
    telemetry = recording.telemetry
    count = telemetry.config.layers
    spread = np.unique(np.linspace(0, count - 1, min(count, PANELS)).round().astype(int))
    chosen = [int(layer) for layer in spread] if layers is None else list(layers)
    check_row(row, len(telemetry.steps))
    for layer in chosen:
        if not 0 <= layer < count:
            raise ValueError(f"layers holds {layer}, expected layers from 0 to {count - 1}")
    steps = int(telemetry.steps[row])
    in_use = telemetry.slots()[:steps, row]
    panels = new_panels(figure, len(chosen), columns=2, sharex=True, sharey=True)
    image, width = None, 0
    for axes, layer in zip(panels, chosen, strict=True):
        shares, edges = binned(recording.held[:steps, layer, row], in_use, bins)
        width = int(edges[1])
        image = axes.pcolormesh(np.arange(steps + 1) + 0.5, edges, shares.T, cmap="Blues", vmin=0, vmax=1)
        axes.set_xlim(0.5, steps + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False)
        if not recording.held[:steps, layer, row].any():
            at = {"ha": "center", "va": "center", "fontsize": 9, "color": INK, "transform": axes.transAxes}
            axes.text(0.5, 0.5, "no selection of positions", **at)
        refreshes = np.flatnonzero(telemetry.refreshed[:steps, layer, row]) + 1
        if len(refreshes):  # an empty line outside its panel has no extent that the layout could use
            above = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(refreshes, np.full(len(refreshes), 1.02), ls="", **_REFRESH, **above)
        for text, position in (marked or {}).items():
            axes.axhline(position, color=_MARKED, lw=0.6, alpha=0.5, gid=GUIDE)  # what lies under it is to be seen
            beside = {"ha": "left", "va": "center", "fontsize": 7.5, "color": _MARKED}
            axes.text(1.01, position, f"◂ {text}", **beside, transform=axes.get_yaxis_transform())
        set_title(axes, f"layer {layer}", pad=12.0)  # above the triangles
        axes.label_outer()
    for axes in panels[-2:]:
        axes.set_xlabel("decode step")
    for axes in panels[::2]:
        axes.set_ylabel("position (tokens)")
    add_colour_bar(figure, image, panels, "share of the positions held, mean over heads")
    finish(
        figure,
        panels,
        origin=f"{telemetry.policy.name}; triangles: refreshes; colours: of {width} neighbouring positions each",
    )
    return panels


_REFRESH = {"marker": "v", "ms": 5, "mec": "none", "color": INK}


def check_row(row: int, rows: int) -> None:
    if not 0 <= row < rows:
        raise ValueError(f"row={row} is not in the batch, expected a row from 0 to {rows - 1}")


def binned(
    held: Float[np.ndarray, "steps slots"], in_use: np.ndarray, bins: int
) -> tuple[Float[np.ndarray, "steps bins"], np.ndarray]:
    """Mean of `held` over runs of neighbouring slots, as long as at most `bins` need; NaN where none of them was in
    use. Also the slots where the bins begin and end."""
    slots = held.shape[1]
    width = -(-slots // bins)
    edges = np.append(np.arange(0, slots, width), slots)
    exists = np.arange(slots)[None, :] < in_use[:, None]
    total = np.add.reduceat(np.where(exists, held, 0), edges[:-1], axis=1)
    there = np.add.reduceat(exists, edges[:-1], axis=1, dtype=int)
    return np.where(there > 0, total / np.maximum(there, 1), np.nan), edges
