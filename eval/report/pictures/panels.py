"""The frame of a picture: its panels, their titles and axes, the legend, and where the numbers come from."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from eval.finished.text import RULER_STYLE, ruler_style
from eval.report.pictures.picture import Row

INK, PALE = "#444444", "#d9d9d9"
GUIDE = "guide"  # marks what helps the eye and is no datum


def new_panels(count: int, *, width: float = 3.7, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """At most three beside each other; inches are of one panel."""
    columns = min(count, 3)
    lines = -(-count // columns)
    # Figure and canvas without pyplot: no global state, no display
    figure = Figure(figsize=(width * columns + 2.0, height * lines + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    found = [axes for row in figure.subplots(lines, columns, squeeze=False) for axes in row]
    for axes in found[count:]:
        axes.remove()
    for axes in found[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.grid(color="#e6e6e6", lw=0.7)
        axes.set_axisbelow(True)
    return figure, found[:count]


def set_title(axes: Axes, text: str, *, size: float = 10, colour: str = INK) -> None:
    axes.set_title(text, loc="left", fontsize=size, fontweight="bold", color=colour)


def powers_of_two(axes: Axes, ticks: Sequence[int], *, thousands: bool = False) -> None:
    """A logarithmic x axis with these ticks alone; 2048 is 2K where `thousands` are told."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{n / 1024:g}K" if thousands and n >= 1024 else f"{n:g}")
    )


def finish(
    figure: Figure, panels: Sequence[Axes], handles: Sequence[Line2D], rows: Sequence[Row], origin: str | None = None
) -> None:
    """The legend beside the panels, and below them where the numbers come from: `origin`, or what the rows tell."""
    for axes in panels:
        axes.tick_params(labelsize=8, color="#999999", labelcolor=INK)
        axes.xaxis.label.set(fontsize=8.5, color=INK)
        axes.yaxis.label.set(fontsize=8.5, color=INK)
    if handles:
        figure.legend(handles=list(handles), loc="outside right upper", frameon=False, fontsize=8, handlelength=2.6)
    origin = origin or "; ".join(dict.fromkeys(f"{row['device']}, {row['mode']} mode" for row in rows))
    if any(ruler_style(row.get("task", "")) for row in rows):
        origin += f"\nrs_ tasks: {RULER_STYLE}"
    figure.supxlabel(origin, x=0.01, ha="left", fontsize=7.5, color="#666666")
