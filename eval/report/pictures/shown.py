"""How a run looks in every picture: one colour and marker for a policy, one dash for a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D

from eval.finished.names import families, labels
from eval.finished.run import Run
from eval.report.pictures.picture import Row
from recycled_jax.plots.style import DENSE, DENSE_DASH, line_style, policy_look

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))


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
