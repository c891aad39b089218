"""The frame of a report's picture: its panels, and where the numbers of its rows come from."""

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.finished.text import RULER_STYLE, ruler_style
from eval.report.pictures.picture import Row
from recycled_jax.plots import style

GUIDE = style.GUIDE


def new_panels(count: int, *, width: float = 3.7, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """At most three beside each other; inches are of one panel."""
    figure = style.new_figure(width * min(count, 3) + 2.0, height * -(-count // 3) + 0.3)
    return figure, style.new_panels(figure, count)


def finish(
    figure: Figure, panels: Sequence[Axes], handles: Sequence[Artist], rows: Sequence[Row], origin: str | None = None
) -> None:
    """The legend beside the panels, and below them where the numbers come from: `origin`, or what the rows tell."""
    origin = origin or "; ".join(dict.fromkeys(f"{row['device']}, {row['mode']} mode" for row in rows))
    if any(ruler_style(row.get("task", "")) for row in rows):
        origin += f"\nrs_ tasks: {RULER_STYLE}"
    style.finish(figure, panels, handles, origin)
