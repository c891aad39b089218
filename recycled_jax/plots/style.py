"""How every picture looks: colours of policies, panels, titles, axes, the legend, and where the numbers come from."""

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import ArrayLike

INK, PALE = "#444444", "#d9d9d9"
GUIDE = "guide"  # marks what helps the eye and is no datum
# Okabe and Ito's palette without its yellow, then two of Tol's: told apart in all common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS = "osD^vPX*"
DENSE = "#222222"
DENSE_DASH = (0, (4, 2))
# a line across, where dense is by definition
DENSE_LEVEL: dict[str, Any] = {"color": DENSE, "ls": DENSE_DASH, "lw": 1.2}


def policy_look(place: int) -> tuple[str, str]:
    """Colour and marker of the policy at a place."""
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def line_style(colour: str, marker: str, dash: Any = "-") -> dict[str, Any]:
    """What matplotlib calls them."""
    return {"color": colour, "ls": dash, "marker": marker, "ms": 4.5, "mec": "white", "lw": 1.6}


def looks(labels: Sequence[str], dense: str | None = None) -> dict[str, dict[str, Any]]:
    """A style for each label in turn; that of the `dense` policy is the same in every picture."""
    others = [label for label in labels if label != dense]
    styles = {label: line_style(*policy_look(place)) for place, label in enumerate(others)}
    return {label: styles.get(label) or line_style(DENSE, "d", DENSE_DASH) for label in labels}


def new_figure(width: float | int, height: float | int) -> Figure:
    """A figure of so many inches, without pyplot: no global state, no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(figure: FigureBase, count: int, *, columns: int = 3, **shared: Any) -> list[Axes]:
    """At most `columns` panels beside each other; `shared` are `sharex` and `sharey` of `Figure.subplots`."""
    columns = min(count, columns)
    found = list(figure.subplots(-(-count // columns), columns, squeeze=False, **shared).flat)
    for axes in found[count:]:
        axes.remove()
    for axes in found[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.grid(color="#e6e6e6", lw=0.7)
        axes.set_axisbelow(True)
    return found[:count]


def set_title(axes: Axes, text: str, *, size: float | int = 10, colour: str = INK, pad: float | None = None) -> None:
    """`pad`: points above the panel (default: matplotlib's)."""
    axes.set_title(text, loc="left", fontsize=size, fontweight="bold", color=colour, pad=pad)


def powers_of_two(axes: Axes, ticks: Sequence[int], *, thousands: bool = False) -> None:
    """A logarithmic x axis with these ticks alone; 2048 is 2K where `thousands` are told."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{n / 1024:g}K" if thousands and n >= 1024 else f"{n:g}")
    )


def draw_line(
    axes: Axes,
    x: ArrayLike,
    y: ArrayLike,
    style: dict[str, Any],
    *,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
) -> None:
    """A line, with a band of its colour where there are `low` and `high`."""
    axes.plot(x, y, **style)
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.14, lw=0)  # pyright: ignore[reportArgumentType]


def draw_unmet(axes: Axes, x: ArrayLike, y: ArrayLike, colour: str) -> None:
    """Open triangles: at least so much, since what is counted did not happen once."""
    axes.plot(x, y, ls="", marker="^", mfc="white", mec=colour, ms=7, zorder=3)


def add_colour_bar(figure: FigureBase, image: Any, panels: Sequence[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=list(panels), fraction=0.03, pad=0.02)
    bar.set_label(label, fontsize=8, color=INK)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=INK)


def marks(styles: dict[str, dict[str, Any]]) -> list[Artist]:
    """What a legend shows of each label."""
    return [Line2D([], [], **style, label=label) for label, style in styles.items()]


def finish(
    figure: FigureBase, panels: Sequence[Axes], handles: Sequence[Artist] = (), origin: str | None = None
) -> None:
    """The legend beside the panels, and below them where the numbers come from."""
    for axes in panels:
        axes.tick_params(labelsize=8, color="#999999", labelcolor=INK)
        axes.xaxis.label.set(fontsize=8.5, color=INK)
        axes.yaxis.label.set(fontsize=8.5, color=INK)
    if handles:
        figure.legend(handles=list(handles), loc="outside right upper", frameon=False, fontsize=8, handlelength=2.6)
    if origin:
        figure.supxlabel(origin, x=0.01, ha="left", fontsize=7.5, color="#666666")
