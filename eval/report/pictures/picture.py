"""A picture of a report: what is drawn, and the rows it was drawn from."""

import csv
import io
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Row = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """`name` is that of its files; `rows` hold every number in it."""

    name: str
    title: str
    caption: str
    figure: Figure
    rows: list[Row]

    def csv(self) -> str:
        """The rows, which all have the fields of the first."""
        file = io.StringIO()
        writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return file.getvalue()

    def svg(self) -> bytes:
        """The drawing; the same picture is the same bytes."""
        file = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return file.getvalue()
