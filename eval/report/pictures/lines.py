"""Pictures with a panel for each task and a line for each run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from eval.report.pictures.panels import GUIDE, finish, new_panels
from eval.report.pictures.picture import Picture, Row
from eval.report.pictures.rows import column, group
from eval.report.pictures.shown import Shown, in_rows
from recycled_jax.plots.style import DENSE_LEVEL, draw_line, set_title

MARKED = 40  # a line of more points has no markers


@dataclass(frozen=True)
class Lines:
    """`x` and `y` are fields of the rows, with what their axes are called. `level` is a line across, where the dense
    policy is; `whole` asks for whole numbers on the x axis; `extra` draws more on a panel, of one run's rows."""

    name: str
    title: str
    caption: str
    x: tuple[str, str]
    y: tuple[str, str]
    level: float | None = None
    whole: bool = False
    bottom: float | None = None
    top: float | None = None
    extra: Callable[[Axes, Shown, Sequence[Row]], None] | None = None

    def draw(self, shown: Sequence[Shown], rows: Sequence[Row]) -> list[Picture]:
        """One for each length; lines have a band where the rows have `low` and `high`."""
        return [self._of_length(shown, length, part) for length, part in group(rows, "length").items()]

    def _of_length(self, shown: Sequence[Shown], length: int, rows: list[Row]) -> Picture:
        tasks = group(rows, "task")
        figure, panels = new_panels(len(tasks))
        for axes, (task, of_task) in zip(panels, tasks.items(), strict=True):
            self._panel(axes, shown, of_task)
            set_title(axes, task)
        handles = [Line2D([], [], **s.style(), label=s.label) for s in in_rows(shown, rows)]
        if self.level is not None:
            handles.append(Line2D([], [], **DENSE_LEVEL, label="dense"))
        finish(figure, panels, handles, rows)
        return Picture(f"{self.name}_{length}", f"{self.title}, {length} tokens", self.caption, figure, rows)

    def _panel(self, axes: Axes, shown: Sequence[Shown], rows: Sequence[Row]) -> None:
        if self.level is not None:
            axes.axhline(self.level, **DENSE_LEVEL, gid=GUIDE)
        for s in shown:
            own = [row for row in rows if row["label"] == s.label]
            look = s.style(**({} if len(own) <= MARKED else {"marker": ""}))
            low, high = (column(own, name) for name in ("low", "high")) if "low" in rows[0] else (None, None)
            draw_line(axes, column(own, self.x[0]), column(own, self.y[0]), look, low=low, high=high)
            if self.extra is not None:
                self.extra(axes, s, own)
        axes.set(xlabel=self.x[1], ylabel=self.y[1])
        axes.set_ylim(self.bottom, self.top)
        if self.whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
