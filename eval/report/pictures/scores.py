"""Pictures of what a budget buys, and what time: scores, or perplexities, against the budget and measured latency."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from eval.finished.means import mean_score, perplexity
from eval.finished.run import Cell
from eval.report.pictures.panels import finish, new_panels
from eval.report.pictures.picture import Picture, Row
from eval.report.pictures.rows import about, cells, column, group
from eval.report.pictures.shown import Shown, family_marks
from recycled_jax.plots.style import DENSE, PALE, powers_of_two, set_title


def score_against_budget(shown: Sequence[Shown]) -> list[Picture]:
    """One for each length at which a run has a budget."""
    by_length = group(_budget_rows(shown), "length")
    return [_of_budgets(shown, n, rows) for n, rows in by_length.items() if any(row["k"] is not None for row in rows)]


def _budget_rows(shown: Sequence[Shown]) -> list[Row]:
    rows = []
    for s, key, cell in cells(shown):
        value = _value(cell)
        if value is not None and (s.run.config.k is not None or s.dense):
            low, high = cell.metrics.interval if cell.metrics and cell.metrics.interval else (None, None)
            what = {"measure": _measure(cell), "k": s.run.config.k, "value": value}
            rows.append({**about(s, key), **what, "low": low, "high": high})
    return rows


def _of_budgets(shown: Sequence[Shown], length: int, rows: list[Row]) -> Picture:
    tasks = {task: of_task for task, of_task in group(rows, "task").items() if any(row["k"] for row in of_task)}
    figure, panels = new_panels(len(tasks))
    for axes, (task, of_task) in zip(panels, tasks.items(), strict=True):
        _budget_panel(axes, shown, of_task)
        _value_axis(axes, task, of_task)
    finish(figure, panels, family_marks(shown, rows), rows)
    caption = "Higher is better, except for perplexity. The dashed line is the dense ceiling; bars are 95 % intervals."
    return Picture(f"score_against_budget_{length}", f"Score against budget, {length} tokens", caption, figure, rows)


def _budget_panel(axes: Axes, shown: Sequence[Shown], rows: Sequence[Row]) -> None:
    for s in shown:
        own = sorted((r for r in rows if r["policy"] == s.family and r["k"]), key=lambda r: r["k"])
        if s.dense:
            for row in (r for r in rows if r["label"] == s.label):
                axes.axhline(row["value"], color=DENSE, linestyle=s.dash, lw=1.4)
        elif own and own[0]["label"] == s.label:  # one line for all budgets of a policy
            axes.plot(column(own, "k"), column(own, "value"), **s.style(ls="-"))
            whole = [row for row in own if row["low"] is not None]
            axes.vlines(
                column(whole, "k"), column(whole, "low"), column(whole, "high"), color=s.colour, lw=1, alpha=0.6
            )
    powers_of_two(axes, sorted({row["k"] for row in rows if row["k"]}))
    axes.margins(x=0.1)
    axes.set_xlabel("budget k (slots)")


def score_against_latency(shown: Sequence[Shown]) -> list[Picture]:
    """One for each length, batch and kind of device, since times of different ones are not comparable."""
    rows = _latency_rows(shown)
    places = group(rows, "device", "batch", "length")
    several = len(group(rows, "device", "batch")) > 1
    return [
        _of_latencies(shown, place, part, f"_{number}" if several else "")
        for number, (place, part) in enumerate(places.items())
    ]


def _latency_rows(shown: Sequence[Shown]) -> list[Row]:
    rows = []
    for s, key, cell in cells(shown):
        value, metrics = _value(cell), cell.metrics
        if value is not None and metrics and metrics.decode_ms_per_step and s.run.config.mode == "gather":
            where = {"measure": _measure(cell), "batch": metrics.batch, "k": s.run.config.k}
            rows.append({**about(s, key), **where, "decode_ms": metrics.decode_ms_per_step, "value": value})
    for same in group(rows, "device", "batch", "length", "task").values():
        front = _front(same)
        for row in same:
            row["on_front"] = row in front
    return rows


def _front(rows: Sequence[Row]) -> list[Row]:
    """Those that no other one beats in both time and value."""
    sign = -1 if rows[0]["measure"] == "perplexity" else 1
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["decode_ms"], -sign * row["value"])):
        if not front or sign * row["value"] > sign * front[-1]["value"]:
            front.append(row)
    return front


def _of_latencies(shown: Sequence[Shown], place: tuple[str, int | None, int], rows: list[Row], end: str) -> Picture:
    device, batch, length = place
    tasks = group(rows, "task")
    figure, panels = new_panels(len(tasks))
    for axes, (task, of_task) in zip(panels, tasks.items(), strict=True):
        _latency_panel(axes, shown, of_task)
        _value_axis(axes, task, of_task)
    front_mark = Line2D([], [], color=PALE, lw=5, label="Pareto front")
    finish(figure, panels, [*family_marks(shown, rows), front_mark], rows)
    caption = (
        f"Up and to the left is better (for perplexity, down). Decode time per step of a batch of {batch}, "
        f"measured on {device}; numbers beside points are budgets. Nothing is better in both than the grey front."
    )
    title = f"Score against measured latency, {length} tokens, batch {batch}, {device}"
    return Picture(f"score_against_latency_{length}{end}", title, caption, figure, rows)


def _latency_panel(axes: Axes, shown: Sequence[Shown], rows: Sequence[Row]) -> None:
    front = sorted((row for row in rows if row["on_front"]), key=lambda row: row["decode_ms"])
    broad: dict[str, Any] = {"color": PALE, "lw": 5, "zorder": 1, "solid_capstyle": "round"}
    axes.plot(column(front, "decode_ms"), column(front, "value"), drawstyle="steps-post", **broad)
    for s in shown:
        own = sorted((r for r in rows if r["policy"] == s.family), key=lambda r: r["k"] or 0)
        if not own or own[0]["label"] != s.label:
            continue
        axes.plot(column(own, "decode_ms"), column(own, "value"), **s.style(ls="-", lw=0.8, ms=8 if s.dense else 6))
        for row in own:
            text = "dense" if s.dense else "" if row["k"] is None else str(row["k"])
            at, look = (row["decode_ms"], row["value"]), {"fontsize": 7, "color": s.colour}
            axes.annotate(text, at, (5, -9), textcoords="offset points", **look)
    axes.margins(x=0.15)
    axes.set_xlim(0, None)
    axes.set_xlabel("decode time per step (ms)")


def _measure(cell: Cell) -> str:
    return "perplexity" if cell.of_perplexity else "score"


def _value(cell: Cell) -> float | None:
    return perplexity(cell) if cell.of_perplexity else mean_score(cell)


def _value_axis(axes: Axes, task: str, rows: Sequence[Row]) -> None:
    set_title(axes, task)
    axes.set_ylabel(rows[0]["measure"])
    if rows[0]["measure"] == "score":
        axes.set_ylim(-4, 104)
