"""Pictures of evaluated runs. Each is drawn from its rows, which are written beside it: no row, no point."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from eval.compare import RULER_STYLE, check_same_examples, mean_score, perplexity
from eval.metrics import interval
from eval.read_runs import Bench, Cell, Run, families, flat, labels

Row = dict[str, Any]
BIN = 16  # generated positions of one point of the perplexity ratio
# Okabe and Ito's palette without its yellow, then two of Tol's: told apart in all common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS = "osD^vPX*"
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))
DENSE, INK, PALE = "#222222", "#444444", "#d9d9d9"
GUIDE = "guide"  # marks what helps the eye and is no datum


@dataclass(frozen=True)
class Picture:
    """`name` is that of its files; `rows` hold every number in it."""

    name: str
    title: str
    caption: str
    figure: Figure
    rows: list[Row]


@dataclass(frozen=True)
class Shown:
    """A run as the pictures show it: one colour and marker for a policy, one dash for a budget."""

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
        return _style(self.colour, self.marker, self.dash) | changes


def show(runs: Sequence[Run]) -> list[Shown]:
    """Colours go by policy in the order of the runs; the largest budget of a policy has the solid line."""
    names = families(runs)
    places = {
        name: i
        for i, name in enumerate(dict.fromkeys(n for n, r in zip(names, runs, strict=True) if not r.config.dense))
    }
    result = []
    for run, label, family in zip(runs, labels(runs), names, strict=True):
        if run.config.dense:
            result.append(Shown(run, label, family, DENSE, "d", (0, (4, 2))))
            continue
        budgets = {r.config.k or 0 for n, r in zip(names, runs, strict=True) if n == family}
        rank = sorted(budgets, reverse=True).index(run.config.k or 0)
        place = places[family]
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        result.append(Shown(run, label, family, colour, marker, DASHES[rank % len(DASHES)]))
    return result


def dense_of(run: Run, runs: Iterable[Run], key: tuple[str, int]) -> Run | None:
    """The dense run with the same examples, question, weights and sampling; None for a dense run itself."""
    if run.config.dense:
        return None
    for other in runs:
        if other.config.dense and key in other.cells and _settings(other) == _settings(run):
            check_same_examples(run.cells[key], other.cells[key])
            return other
    return None


def pictures(runs: Sequence[Run]) -> tuple[list[Picture], list[str]]:
    """All that there are data for, and one line for each one left out."""
    shown, drawn, missing = show(runs), [], []
    for title, draw, reason in _PICTURES:
        found = draw(shown)
        drawn += found
        if not found:
            missing.append(f"{title}: left out, {reason}.")
    return drawn, missing


def _score_against_budget(shown: Sequence[Shown]) -> list[Picture]:
    rows = []
    for s, key, cell in _cells(shown):
        value = _value(cell)
        if value is not None and (s.run.config.k is not None or s.dense):
            low, high = cell.metrics.interval if cell.metrics and cell.metrics.interval else (None, None)
            rows.append(
                {
                    **_about(s, key),
                    "measure": _measure(cell),
                    "k": s.run.config.k,
                    "value": value,
                    "low": low,
                    "high": high,
                }
            )
    result = []
    for length, part in _by(rows, "length").items():
        if all(row["k"] is None for row in part):
            continue
        tasks = _by([row for row in part if any(o["task"] == row["task"] and o["k"] for o in part)], "task")
        figure, panels = _panels(len(tasks))
        for axes, (task, of_task) in zip(panels, tasks.items(), strict=True):
            budgets = sorted({row["k"] for row in of_task if row["k"]})
            for s in shown:
                own = sorted((r for r in of_task if r["policy"] == s.family and r["k"]), key=lambda r: r["k"])
                if s.dense:
                    for row in (r for r in of_task if r["label"] == s.label):
                        axes.axhline(row["value"], color=DENSE, linestyle=s.dash, lw=1.4)
                elif own and own[0]["label"] == s.label:
                    x, y = [r["k"] for r in own], [r["value"] for r in own]
                    axes.plot(x, y, **s.style(ls="-"))
                    whole = [r for r in own if r["low"] is not None]
                    axes.vlines(
                        [r["k"] for r in whole],
                        [r["low"] for r in whole],
                        [r["high"] for r in whole],
                        color=s.colour,
                        lw=1,
                        alpha=0.6,
                    )
            _budget_axis(axes, budgets)
            _value_axis(axes, task, of_task)
        _finish(figure, panels, _families(shown, part), part)
        caption = (
            "Higher is better, except for perplexity. The dashed line is the dense ceiling; bars are 95 % intervals."
        )
        result.append(
            Picture(f"score_against_budget_{length}", f"Score against budget, {length} tokens", caption, figure, part)
        )
    return result


def _score_against_latency(shown: Sequence[Shown]) -> list[Picture]:
    rows = []
    for s, key, cell in _cells(shown):
        value, metrics = _value(cell), cell.metrics
        if value is not None and metrics and metrics.decode_ms_per_step and s.run.config.mode == "gather":
            where = {"measure": _measure(cell), "batch": metrics.batch, "k": s.run.config.k}
            rows.append({**_about(s, key), **where, "decode_ms": metrics.decode_ms_per_step, "value": value})
    for _, same in _by(rows, "device", "batch", "length", "task").items():
        front = _front(same)
        for row in same:
            row["on_front"] = row in front
    result = []
    for (device, batch, length), part in _by(rows, "device", "batch", "length").items():
        tasks = _by(part, "task")
        figure, panels = _panels(len(tasks))
        for axes, (task, of_task) in zip(panels, tasks.items(), strict=True):
            front = sorted((row for row in of_task if row["on_front"]), key=lambda row: row["decode_ms"])
            axes.plot(
                [r["decode_ms"] for r in front],
                [r["value"] for r in front],
                color=PALE,
                lw=5,
                zorder=1,
                solid_capstyle="round",
                drawstyle="steps-post",
            )
            for s in shown:
                own = sorted((r for r in of_task if r["policy"] == s.family), key=lambda r: r["k"] or 0)
                if not own or own[0]["label"] != s.label:
                    continue
                x, y = [r["decode_ms"] for r in own], [r["value"] for r in own]
                axes.plot(x, y, **s.style(ls="-", lw=0.8, ms=8 if s.dense else 6))
                for row in own:
                    text = "dense" if s.dense else "" if row["k"] is None else str(row["k"])
                    axes.annotate(
                        text,
                        (row["decode_ms"], row["value"]),
                        (5, -9),
                        textcoords="offset points",
                        fontsize=7,
                        color=s.colour,
                    )
            axes.margins(x=0.15)
            axes.set_xlim(0, None)
            axes.set_xlabel("decode time per step (ms)")
            _value_axis(axes, task, of_task)
        front_mark = Line2D([], [], color=PALE, lw=5, label="Pareto front")
        _finish(figure, panels, [*_families(shown, part), front_mark], part)
        caption = (
            f"Up and to the left is better (for perplexity, down). Decode time per step of a batch of {batch}, "
            f"measured on {device}; numbers beside points are budgets. Nothing is better in both than the grey front."
        )
        title = f"Score against measured latency, {length} tokens, batch {batch}, {device}"
        place = "" if len(_by(rows, "device", "batch")) == 1 else f"_{len(result)}"
        result.append(Picture(f"score_against_latency_{length}{place}", title, caption, figure, part))
    return result


def _perplexity_by_position(shown: Sequence[Shown]) -> list[Picture]:
    rows = []
    for s, key, cell in _cells(shown):
        dense = dense_of(s.run, (o.run for o in shown), key) if cell.perplexity else None
        if dense is None:
            continue
        theirs = dense.cells[key].predictions
        common = [line for line, one in cell.predictions.items() if one.nll and line in theirs and theirs[line].nll]
        if not common:
            continue
        more = np.array([cell.predictions[i].nll for i in common]) - np.array([theirs[i].nll for i in common])
        for first in range(0, more.shape[1], BIN):
            by_document = more[:, first : first + BIN].mean(axis=1)
            low, high = _band(by_document)
            place = {"from": first, "to": min(first + BIN, more.shape[1]) - 1, "documents": len(common)}
            middle = (place["from"] + place["to"]) / 2
            ratio = float(np.exp(by_document.mean()))
            rows.append({**_about(s, key), **place, "position": middle, "ratio": ratio, "low": low, "high": high})
    title = "Perplexity ratio against generated position"
    caption = (
        f"Perplexity over the dense policy's, in bins of {BIN} generated tokens, paired by document and position: 1 is "
        "no loss. Bands: 95 % bootstrap over documents. Position 0 comes from prefill."
    )
    return _lines(
        shown,
        rows,
        "perplexity_by_position",
        title,
        caption,
        "position",
        "ratio",
        xlabel="generated position (tokens)",
        ylabel="perplexity ÷ dense",
        level=1,
    )


def _stride_by_layer(shown: Sequence[Shown]) -> list[Picture]:
    rows = []
    for s, key, cell in _cells(shown):
        counts = [one.gen_tokens - 1 for one in cell.predictions.values() if one.gen_tokens]
        if s.dense or cell.metrics is None or not counts:
            continue
        for layer, stride in enumerate(cell.metrics.effective_stride):
            never = stride is None
            steps = float(np.mean(counts))
            row = {
                **_about(s, key),
                "layer": layer,
                "stride": stride,
                "steps": steps,
                "shown": steps if never else stride,
            }
            rows.append(row | {"no_refresh": never})
    if all(row["no_refresh"] for row in rows):
        return []
    caption = (
        "Decode steps per refresh, as observed. An open triangle: no refresh in all the steps, so the stride is longer."
    )

    def mark(axes: Axes, s: Shown, own: Sequence[Row]) -> None:
        never = [row for row in own if row["no_refresh"]]
        axes.plot(
            [r["layer"] for r in never],
            [r["shown"] for r in never],
            ls="",
            marker="^",
            mfc="white",
            mec=s.colour,
            ms=7,
            zorder=3,
        )

    return _lines(
        shown,
        rows,
        "stride_by_layer",
        "Effective stride per layer",
        caption,
        "layer",
        "shown",
        xlabel="layer",
        ylabel="steps per refresh",
        whole=True,
        bottom=0,
        extra=mark,
    )


def _overlap_by_layer(shown: Sequence[Shown]) -> list[Picture]:
    rows = [
        {**_about(s, key), "layer": layer, "overlap": overlap}
        for s, key, cell in _cells(shown)
        if cell.metrics
        for layer, overlap in enumerate(cell.metrics.overlap)
        if overlap is not None
    ]
    caption = "Share of the slots of two successive selections that both have (intersection over union), at refreshes."
    return _lines(
        shown,
        rows,
        "overlap_by_layer",
        "Overlap of selections per layer",
        caption,
        "layer",
        "overlap",
        xlabel="layer",
        ylabel="overlap",
        whole=True,
        bottom=0,
        top=1.03,
    )


def _coverage_by_age(shown: Sequence[Shown]) -> list[Picture]:
    rows = []
    for s, key, cell in _cells(shown):
        by_layer: dict[int, dict[int, list[float]]] = {}
        for layer in (layer for layers in cell.telemetry.values() for layer in layers):
            for age, value in enumerate(layer.coverage_by_age):
                if value is not None:
                    by_layer.setdefault(age, {}).setdefault(layer.layer, []).append(value)
        for age, layers in sorted(by_layer.items()):
            means = [float(np.mean(values)) for values in layers.values()]
            spread = {"coverage": float(np.mean(means)), "low": min(means), "high": max(means), "layers": len(means)}
            rows.append({**_about(s, key), "mode": "mask", "steps_since_refresh": age, **spread})
    caption = (
        "Attention mass that the selection holds, which falls as it ages. Mean over examples and layers; bands from "
        "the lowest layer to the highest. Measured with dense scores: the pass is in mask mode."
    )
    return _lines(
        shown,
        rows,
        "coverage_by_age",
        "Coverage against steps since the refresh",
        caption,
        "steps_since_refresh",
        "coverage",
        xlabel="steps since the refresh",
        ylabel="coverage",
        whole=True,
        top=1.03,
    )


def _output_length(shown: Sequence[Shown]) -> list[Picture]:
    rows = []
    for s, key, cell in _cells(shown):
        dense = None if cell.perplexity else dense_of(s.run, (o.run for o in shown), key)
        pairs = [] if dense is None else _lengths(cell, dense.cells[key])
        if pairs:
            ours, theirs = (float(np.mean(column)) for column in zip(*pairs, strict=True))
            rows.append(
                {**_about(s, key), "n": len(pairs), "tokens": ours, "dense_tokens": theirs, "ratio": ours / theirs}
            )
    result = []
    for length, part in _by(rows, "length").items():
        tasks = list(_by(part, "task"))
        own = [s for s in shown if any(row["label"] == s.label for row in part)]
        figure, [axes] = _panels(1, width=6.2, height=1.0 + len(tasks) * max(0.35, 0.14 * len(own)))
        axes.axvline(1, color=DENSE, ls=(0, (4, 2)), lw=1.2, gid=GUIDE)
        for place, s in enumerate(own):
            for row in (row for row in part if row["label"] == s.label):
                y = tasks.index(row["task"]) + (place - (len(own) - 1) / 2) * 0.7 / len(own)
                axes.plot([row["ratio"]], [y], **_dot(s))
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        axes.set_xlabel("mean output tokens ÷ dense's")
        handles = [Line2D([], [], **_dot(s), label=s.label) for s in own]
        handles.append(Line2D([], [], color=DENSE, ls=(0, (4, 2)), lw=1.2, label="dense"))
        _finish(figure, [axes], handles, part)
        caption = (
            "Right of 1 a policy writes more than the dense one on the same examples, and loses the time it has saved."
        )
        result.append(
            Picture(f"output_length_{length}", f"Output length against dense, {length} tokens", caption, figure, part)
        )
    return result


def _needle_maps(shown: Sequence[Shown]) -> list[Picture]:
    rows = []
    for s, key, cell in _cells(shown):
        found: dict[float, list[float]] = {}
        for one in cell.predictions.values():
            if one.score is not None and isinstance(one.meta.get("depth"), int | float):
                found.setdefault(one.meta["depth"], []).append(one.score)
        for depth, scores in found.items():
            row = {**_about(s, key), "depth": depth, "n": len(scores), "score": float(np.mean(scores))}
            dense = dense_of(s.run, (o.run for o in shown), key)
            others = dense.cells[key].predictions if dense else {}
            both = [
                (p.score, others[i].score)
                for i, p in cell.predictions.items()
                if i in others and p.meta.get("depth") == depth
            ]
            pairs = [(a, b) for a, b in both if a is not None and b is not None]
            rows.append(row | {"difference": float(np.mean([a - b for a, b in pairs])) if pairs else None})
    result = []
    for task, part in _by(rows, "task").items():
        if len({row["depth"] for row in part}) < 2:
            continue
        whole = [("score", "Needle: score by depth and length", "viridis", (0.0, 100.0))]
        largest = max((abs(row["difference"]) for row in part if row["difference"] is not None), default=0)
        whole.append(("difference", "Needle: difference from dense", "RdBu", (-max(largest, 20), max(largest, 20))))
        for field, title, colours, limits in whole:
            some = [row for row in part if row[field] is not None]
            if some:
                caption = (
                    "Mean score (0 to 100) of the examples at a depth, in percent of the context from its beginning."
                )
                if field == "difference":
                    caption = "Points of score above (blue) or below (red) the dense policy on the same examples."
                figure = _maps(shown, some, field, colours, limits)
                result.append(Picture(f"needle_{field}_{task}", f"{title}, {task}", caption, figure, some))
    return result


def _maps(shown: Sequence[Shown], rows: Sequence[Row], field: str, colours: str, limits: tuple[float, float]) -> Figure:
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    own = [s for s in shown if any(row["label"] == s.label for row in rows)]
    figure, panels = _panels(
        len(own), width=max(2.7, 0.5 * len(lengths) + 1.2), height=max(2.0, 0.26 * len(depths) + 0.9)
    )
    image = None
    for axes, s in zip(panels, own, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row in (row for row in rows if row["label"] == s.label):
            grid[depths.index(row["depth"]), lengths.index(row["length"])] = row[field]
        image = axes.pcolormesh(
            np.ma.masked_invalid(grid), cmap=colours, vmin=limits[0], vmax=limits[1], ec="white", lw=0.8
        )
        for y, x in zip(*np.nonzero(~np.isnan(grid)), strict=True):
            place = (grid[y, x] - limits[0]) / (limits[1] - limits[0])
            dark = place < 0.55 if field == "score" else abs(place - 0.5) > 0.32
            text = (
                f"{grid[y, x]:.0f}" if field == "score" else f"{grid[y, x]:+.0f}".replace("-", "−").replace("+0", "0")
            )
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
        axes.set_xticks(
            np.arange(len(lengths)) + 0.5, [f"{n:,}" for n in lengths], rotation=45 if len(lengths) > 4 else 0
        )
        axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:g} %" for depth in depths])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set(xlabel="length (tokens)", ylabel="depth")
        axes.set_title(s.label, loc="left", fontsize=9, color=s.colour, fontweight="bold")
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), fraction=0.03, pad=0.02)
    bar.set_label("score" if field == "score" else "points from dense", fontsize=8)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=8, length=0)
    _finish(figure, panels, [], rows)
    return figure


def _bench_curves(shown: Sequence[Shown]) -> list[Picture]:
    rows = [_bench_row(bench_label(one, s.run, s.label), one) for s in shown for one in s.run.bench]
    dense_label = next((s.label for s in shown if s.dense), "dense")
    there = {_bench_place(row) for row in rows if row["label"] == dense_label}
    for one in (one for s in shown for one in s.run.bench if one.dense_decode and one.valid):
        row = _bench_row(dense_label, one, of_dense=True)
        if _bench_place(row) not in there:
            there.add(_bench_place(row))
            rows.append(row)
    result = []
    for (device, kind), part in _by(rows, "device", "kind").items():
        usable = [row for row in part if row["valid"] and row["p50"] is not None]
        if not usable:
            continue
        batches = _by(part, "batch")
        figure, panels = _panels(len(batches), width=4.2, height=3.0)
        styles = _bench_styles(shown, part)
        for axes, (batch, of_batch) in zip(panels, batches.items(), strict=True):
            for name, style in styles.items():
                own = sorted((r for r in of_batch if r["label"] == name), key=lambda r: r["length"])
                good = [r for r in own if r["valid"] and r["p50"] is not None]
                axes.plot([r["length"] for r in good], [r["p50"] for r in good], **style)
                axes.fill_between(
                    [r["length"] for r in good],
                    [r["p10"] for r in good],
                    [r["p90"] for r in good],
                    color=style["color"],
                    alpha=0.15,
                    lw=0,
                )
                floors = [r for r in good if r["floor_ms"] is not None]
                axes.plot(
                    [r["length"] for r in floors], [r["floor_ms"] for r in floors], color=style["color"], lw=1, ls=":"
                )
                for row in (row for row in own if row["status"] == "oom"):
                    axes.text(
                        row["length"],
                        0.03,
                        "✕ out of\nmemory",
                        color=style["color"],
                        fontsize=6.5,
                        ha="center",
                        transform=axes.get_xaxis_transform(),
                    )
            axes.set_xscale("log", base=2)
            lengths = sorted({row["length"] for row in of_batch})
            axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)  # of those out of memory too
            axes.xaxis.set_major_locator(FixedLocator(lengths))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}K" if n >= 1024 else f"{n:g}"))
            axes.set_ylim(0, None)
            axes.set(xlabel="length (tokens)", ylabel="decode ms per step")
            axes.set_title(f"batch {batch}", loc="left", fontsize=10, fontweight="bold", color=INK)
        handles = [Line2D([], [], **style, label=name) for name, style in styles.items()]
        handles.append(Line2D([], [], color=INK, lw=1, ls=":", label="its floor"))
        modes = ", ".join(dict.fromkeys(row["mode"] for row in part))
        weights = ", ".join(dict.fromkeys(row["weights"] for row in part))
        _finish(figure, panels, handles, [], f"{device}; {modes} mode; {kind}; {weights} weights")
        void = sum(not row["valid"] and row["status"] == "ok" for row in part)
        caption = (
            "Median time of a decode step; bands from the 10th to the 90th percentile; dotted: bytes read ÷ bandwidth. "
            f"{kind.replace('_', ' ').capitalize()} on {device}."
            + (f" {void} void records are not drawn: the dense runs around them drifted apart." if void else "")
        )
        what = "measured" if kind == "measured" else "estimated, not measured"
        result.append(
            Picture(f"bench_{len(result)}", f"Decode time against length, {what}, {device}", caption, figure, part)
        )
    return result


def _bench_row(label: str, one: Bench, *, of_dense: bool = False) -> Row:
    """A record's own times, or those of the dense runs around it."""
    low, median, high = (one.dense_decode if of_dense else one.decode) or (None, None, None)
    place = {"device": one.device, "kind": one.kind, "length": one.length, "batch": one.batch}
    state = {"mode": one.mode, "weights": one.weights, "status": "ok" if of_dense else one.status, "valid": one.valid}
    floor = None if of_dense else one.floor_ms
    return {"label": label, **place, **state, "p10": low, "p50": median, "p90": high, "floor_ms": floor}


def _bench_place(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("device", "kind", "length", "batch"))


def bench_label(one: Bench, run: Run, label: str) -> str:
    """The run's own label, but for records of another policy."""
    if flat(one.policy) == flat(run.config.policy):
        return label
    return ", ".join(
        [str(one.policy["name"]), *(f"{name} {v}" for name, v in flat(one.policy).items() if name != "name")]
    )


def _bench_styles(shown: Sequence[Shown], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    known = {"dense": _style(DENSE, "d", (0, (4, 2)))}
    known |= {s.label: s.style() for s in shown}
    labels = dict.fromkeys(row["label"] for row in rows)
    further = [name for name in labels if name not in known]
    used = len({s.family for s in shown if not s.dense})
    for place, name in enumerate(further, start=used):
        known[name] = _style(COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], "-")
    return {name: known[name] for name in labels}


def _style(colour: str, marker: str, dash: Any) -> dict[str, Any]:
    return {"color": colour, "ls": dash, "marker": marker, "ms": 4.5, "mec": "white", "lw": 1.6}


def _dot(s: Shown) -> dict[str, Any]:
    """Without a line; open where the line would be dashed."""
    return s.style(ls="", ms=6, mfc=s.colour if s.dash == "-" else "white", mec=s.colour)


def _lines(
    shown: Sequence[Shown],
    rows: Sequence[Row],
    name: str,
    title: str,
    caption: str,
    x: str,
    y: str,
    *,
    xlabel: str,
    ylabel: str,
    level: float | None = None,
    whole: bool = False,
    bottom: float | None = None,
    top: float | None = None,
    extra: Callable[[Axes, Shown, Sequence[Row]], None] | None = None,
) -> list[Picture]:
    """A picture for each length, with a panel for each task and a line for each run; a band where rows have one.
    `level` is a line across, `whole` asks for whole numbers on the x axis."""
    result = []
    for length, part in _by(rows, "length").items():
        tasks = _by(part, "task")
        figure, panels = _panels(len(tasks))
        for axes, (task, of_task) in zip(panels, tasks.items(), strict=True):
            if level is not None:
                axes.axhline(level, color=DENSE, ls=(0, (4, 2)), lw=1.2, gid=GUIDE)
            for s in shown:
                own = [row for row in of_task if row["label"] == s.label]
                at = [row[x] for row in own]
                few = len(own) <= 40
                axes.plot(at, [row[y] for row in own], **s.style(**({} if few else {"marker": ""})))
                if "low" in of_task[0]:
                    low, high = ([row[end] for row in own] for end in ("low", "high"))
                    axes.fill_between(at, low, high, color=s.colour, alpha=0.12, lw=0)
                if extra is not None:
                    extra(axes, s, own)
            axes.set_title(task, loc="left", fontsize=10, fontweight="bold", color=INK)
            axes.set(xlabel=xlabel, ylabel=ylabel)
            axes.set_ylim(bottom, top)
            if whole:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [
            Line2D([], [], **s.style(), label=s.label) for s in shown if any(r["label"] == s.label for r in part)
        ]
        if level is not None:
            handles.append(Line2D([], [], color=DENSE, ls=(0, (4, 2)), lw=1.2, label="dense"))
        _finish(figure, panels, handles, part)
        result.append(Picture(f"{name}_{length}", f"{title}, {length} tokens", caption, figure, part))
    return result


def _panels(count: int, *, width: float = 3.7, height: float = 2.7) -> tuple[Figure, list[Axes]]:
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


def _finish(
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
    if any(row.get("task", "").startswith("rs_") for row in rows):
        origin += f"\nrs_ tasks: {RULER_STYLE}"
    figure.supxlabel(origin, x=0.01, ha="left", fontsize=7.5, color="#666666")


def _cells(shown: Sequence[Shown]) -> list[tuple[Shown, tuple[str, int], Cell]]:
    keys = sorted({key for s in shown for key in s.run.cells})
    return [(s, key, s.run.cells[key]) for key in keys for s in shown if key in s.run.cells]


def _about(s: Shown, key: tuple[str, int]) -> Row:
    """What every row begins with."""
    place = {"device": s.run.device, "mode": s.run.config.mode}
    return {"label": s.label, "policy": s.family, "task": key[0], "length": key[1], **place}


def _by(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[names[0]] if len(names) == 1 else tuple(row[n] for n in names), []).append(row)
    return groups


def _measure(cell: Cell) -> Literal["score", "perplexity"]:
    return "perplexity" if cell.perplexity else "score"


def _value(cell: Cell) -> float | None:
    return perplexity(cell) if cell.perplexity else mean_score(cell)


def _value_axis(axes: Axes, task: str, rows: Sequence[Row]) -> None:
    axes.set_title(task, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_ylabel(rows[0]["measure"])
    if rows[0]["measure"] == "score":
        axes.set_ylim(-4, 104)


def _budget_axis(axes: Axes, budgets: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(budgets))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
    axes.margins(x=0.1)
    axes.set_xlabel("budget k (slots)")


def _front(rows: Sequence[Row]) -> list[Row]:
    """Those that no other one beats in both time and value."""
    sign = -1 if rows[0]["measure"] == "perplexity" else 1
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["decode_ms"], -sign * row["value"])):
        if not front or sign * row["value"] > sign * front[-1]["value"]:
            front.append(row)
    return front


def _band(differences: np.ndarray) -> tuple[float, float]:
    """95 % of the ratio exp(mean), by bootstrap over documents."""
    low, high = interval(differences.tolist())
    return float(np.exp(low)), float(np.exp(high))


def _families(shown: Sequence[Shown], rows: Sequence[Row]) -> list[Line2D]:
    """A mark of the legend for each policy."""
    first = {s.family: s for s in reversed(shown) if any(row["policy"] == s.family for row in rows)}
    order = [s for s in shown if first.get(s.family) is s]
    return [Line2D([], [], **s.style(ls=s.dash if s.dense else "-"), label=s.family) for s in order]


def _lengths(ours: Cell, theirs: Cell) -> list[tuple[int, int]]:
    """Output tokens of the same examples."""
    common = sorted(ours.predictions.keys() & theirs.predictions.keys())
    both = [(ours.predictions[i].gen_tokens, theirs.predictions[i].gen_tokens) for i in common]
    return [(a, b) for a, b in both if a is not None and b]


def _settings(run: Run) -> str:
    """What the policy's run and the dense one have to share."""
    names = ("model", "question", "template", "sampling")
    return json.dumps([run.config.values.get(name) for name in names], sort_keys=True)


_PICTURES: Sequence[tuple[str, Callable[[Sequence[Shown]], list[Picture]], str]] = (
    ("Score against budget", _score_against_budget, "no scored run has a budget k"),
    ("Score against measured latency", _score_against_latency, "no scored run in gather mode has a decode time"),
    (
        "Perplexity ratio against generated position",
        _perplexity_by_position,
        "no perplexities of a policy and of the dense one on the same documents",
    ),
    ("Effective stride per layer", _stride_by_layer, "no run has refreshed"),
    ("Needle heat maps", _needle_maps, "no task has scores at several depths"),
    ("Coverage against steps since the refresh", _coverage_by_age, "no telemetry has coverage, which needs mask mode"),
    ("Overlap of selections per layer", _overlap_by_layer, "no run has measured overlaps"),
    ("Output length against dense", _output_length, "no policy has answered the dense run's examples"),
    ("Decode time against length", _bench_curves, "no run has valid records in bench.jsonl"),
)
