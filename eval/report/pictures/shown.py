"""How a run looks in every picture: one colour and marker for a policy, one dash for a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D

from eval.finished.names import families, labels
from eval.finished.run import Run
from eval.report.pictures.picture import Row

# Okabe and Ito's palette without its yellow, then two of Tol's: told apart in all common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS = "osD^vPX*"
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))
DENSE = "#222222"
DENSE_DASH = (0, (4, 2))
DENSE_LEVEL: dict[str, Any] = {
    "color": DENSE,
    "ls": DENSE_DASH,
    "lw": 1.2,
}  # a line across, where dense is by definition


@dataclass(frozen=True)
class Shown:
    """A run, what it is called, and its look. `family` is its policy without the budget."""

    run: Run
    label: str
    family: str
    colour: str
    marker: str
    dash: Any

    @property
    def dense(self) -> bool:
        return self.run.config.dense

    def style(self, **changes: Any) -> dict[str, Any]:
        """What matplotlib calls them."""
        return line_style(self.colour, self.marker, self.dash) | changes


def show(runs: Sequence[Run]) -> list[Shown]:
    """Colours go by policy in the order of the runs; the largest budget of a policy has the solid line."""
    named = list(zip(runs, labels(runs), families(runs), strict=True))
    policies = list(dict.fromkeys(family for run, _, family in named if not run.config.dense))
    result = []
    for run, label, family in named:
        if run.config.dense:
            result.append(Shown(run, label, family, DENSE, "d", DENSE_DASH))
            continue
        budgets = {other.config.k or 0 for other, _, its in named if its == family}
        rank = sorted(budgets, reverse=True).index(run.config.k or 0)
        colour, marker = policy_look(policies.index(family))
        result.append(Shown(run, label, family, colour, marker, DASHES[rank % len(DASHES)]))
    return result


def policy_look(place: int) -> tuple[str, str]:
    """Colour and marker of the policy at a place."""
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def line_style(colour: str, marker: str, dash: Any) -> dict[str, Any]:
    return {"color": colour, "ls": dash, "marker": marker, "ms": 4.5, "mec": "white", "lw": 1.6}


def in_rows(shown: Sequence[Shown], rows: Sequence[Row]) -> list[Shown]:
    """Those that have a row."""
    labels = {row["label"] for row in rows}
    return [s for s in shown if s.label in labels]


def family_marks(shown: Sequence[Shown], rows: Sequence[Row]) -> list[Line2D]:
    """A mark of the legend for each policy that has a row."""
    policies = {row["policy"] for row in rows}
    first = {s.family: s for s in reversed(shown)}
    return [
        Line2D([], [], **s.style(ls=s.dash if s.dense else "-"), label=s.family)
        for s in shown
        if s.family in policies and first[s.family] is s
    ]
