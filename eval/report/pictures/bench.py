"""Pictures of how long decode steps take at each length, from the records of benchmarks."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from eval.finished.names import bench_label
from eval.finished.run import Bench
from eval.report.pictures.panels import finish, new_panels
from eval.report.pictures.picture import Picture, Row
from eval.report.pictures.rows import column, group
from eval.report.pictures.shown import Shown
from recycled_jax.plots.style import (
    DENSE,
    DENSE_DASH,
    INK,
    draw_line,
    line_style,
    policy_look,
    powers_of_two,
    set_title,
)


def bench_curves(shown: Sequence[Shown]) -> list[Picture]:
    """One for each device and kind of number, which are never mixed; a panel for each batch."""
    parts = [(key, rows) for key, rows in group(_rows(shown), "device", "kind").items() if any(map(_drawn, rows))]
    return [_picture(shown, number, key, rows) for number, (key, rows) in enumerate(parts)]


def _rows(shown: Sequence[Shown]) -> list[Row]:
    """A row for each record, and the dense times around records where no record of the dense policy tells them."""
    rows = [_row(bench_label(one, s.run, s.label), one) for s in shown for one in s.run.bench]
    dense_label = next((s.label for s in shown if s.dense), "dense")
    there = {_place(row) for row in rows if row["label"] == dense_label}
    for one in (one for s in shown for one in s.run.bench if one.dense_decode and one.valid):
        row = _row(dense_label, one, of_dense=True)
        if _place(row) not in there:
            there.add(_place(row))
            rows.append(row)
    return rows


def _row(label: str, one: Bench, *, of_dense: bool = False) -> Row:
    """A record's own times, or those of the dense runs around it."""
    low, median, high = (one.dense_decode if of_dense else one.decode) or (None, None, None)
    place = {"device": one.device, "kind": one.kind, "length": one.length, "batch": one.batch}
    state = {"mode": one.mode, "weights": one.weights, "status": "ok" if of_dense else one.status, "valid": one.valid}
    floor = None if of_dense else one.floor_ms
    return {"label": label, **place, **state, "p10": low, "p50": median, "p90": high, "floor_ms": floor}


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("device", "kind", "length", "batch"))


def _drawn(row: Row) -> bool:
    return row["valid"] and row["p50"] is not None


def _picture(shown: Sequence[Shown], number: int, key: tuple[str, str], rows: list[Row]) -> Picture:
    device, kind = key
    batches = group(rows, "batch")
    figure, panels = new_panels(len(batches), width=4.2, height=3.0)
    styles = _styles(shown, rows)
    for axes, (batch, of_batch) in zip(panels, batches.items(), strict=True):
        for label, style in styles.items():
            own = sorted((row for row in of_batch if row["label"] == label), key=lambda row: row["length"])
            _curve(axes, own, style)
        lengths = sorted({row["length"] for row in of_batch})
        powers_of_two(axes, lengths, thousands=True)
        axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)  # of those out of memory too
        axes.set_ylim(0, None)
        axes.set(xlabel="length (tokens)", ylabel="decode ms per step")
        set_title(axes, f"batch {batch}")
    handles = [Line2D([], [], **style, label=label) for label, style in styles.items()]
    handles.append(Line2D([], [], color=INK, lw=1, ls=":", label="its floor"))
    modes, weights = (", ".join(dict.fromkeys(column(rows, name))) for name in ("mode", "weights"))
    finish(figure, panels, handles, [], f"{device}; {modes} mode; {kind}; {weights} weights")
    what = "measured" if kind == "measured" else "estimated, not measured"
    title = f"Decode time against length, {what}, {device}"
    return Picture(f"bench_{number}", title, _caption(device, kind, rows), figure, rows)


def _caption(device: str, kind: str, rows: Sequence[Row]) -> str:
    caption = (
        "Median time of a decode step; bands from the 10th to the 90th percentile; dotted: bytes read ÷ bandwidth. "
        f"{kind.replace('_', ' ').capitalize()} on {device}."
    )
    void = sum(not row["valid"] and row["status"] == "ok" for row in rows)
    if void:
        caption += f" {void} void records are not drawn: the dense runs around them drifted apart."
    return caption


def _curve(axes: Axes, rows: Sequence[Row], style: dict[str, Any]) -> None:
    """Median, band and floor of a policy's records, and where it ran out of memory."""
    good, colour = [row for row in rows if _drawn(row)], style["color"]
    band = {"low": column(good, "p10"), "high": column(good, "p90")}
    draw_line(axes, column(good, "length"), column(good, "p50"), style, **band)
    floors = [row for row in good if row["floor_ms"] is not None]
    axes.plot(column(floors, "length"), column(floors, "floor_ms"), color=colour, lw=1, ls=":")
    for row in (row for row in rows if row["status"] == "oom"):
        at = {"ha": "center", "transform": axes.get_xaxis_transform()}
        axes.text(row["length"], 0.03, "✕ out of\nmemory", color=colour, fontsize=6.5, **at)


def _styles(shown: Sequence[Shown], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By label. Policies that only benchmarks know come after those of the runs."""
    known = {"dense": line_style(DENSE, "d", DENSE_DASH)} | {s.label: s.style() for s in shown}
    labels = dict.fromkeys(column(rows, "label"))
    further = [label for label in labels if label not in known]
    for place, label in enumerate(further, start=len({s.family for s in shown if not s.dense})):
        known[label] = line_style(*policy_look(place), "-")
    return {label: known[label] for label in labels}
