"""One HTML page about evaluated runs, which needs no network: what they score and cost, their settings and pictures.
The numbers of the pictures stand beside it as CSV, the tables as Markdown."""

import base64
import csv
import html
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from eval.compare import (
    RULER_STYLE,
    change,
    decode_ratio,
    markdown_table,
    mean_score,
    mean_stride,
    perplexity,
    shown_bytes,
    signed,
)
from eval.metrics import LEAST_CEILING
from eval.pictures import Picture, bench_label, dense_of, pictures
from eval.read_runs import Bench, Cell, Run, flat, labels, read_runs

NONE = "–"

# The questions of a report and the columns that answer them.
_COSTS = (
    ("Is it faster?", ("decode ms", "dense ÷ it", "prefill ms", "dense ÷ it")),
    ("Why?", ("bytes per step", "KV of dense", "floor ms", "MBU")),
    ("What did the schedule do?", ("effective stride",)),
    ("Did recycling make sense?", ("overlap", "coverage")),
    ("Did the text change?", ("tokens", "÷ dense", "at limit", "as dense")),
    ("Was the policy exercised?", ("policy steps",)),
)
_SCORES = (("Is it as good?", ("score [95 %], n", "dense", "retention", "difference [95 %], n")), *_COSTS)
_PERPLEXITIES = (("Is it as good?", ("perplexity, n", "dense", "ratio [95 %], n")), *_COSTS)
_HEADLINE_NOTES = (
    "Dense is the policy that always reads everything; its score on the same examples is the ceiling. Retention is the "
    f"score in percent of it; below a dense score of {LEAST_CEILING} there is none. Differences and ratios are paired "
    "by example. With 100 examples and a score of 90 the interval reaches about 6 points to each side.",
    "Decode time is of a step of the whole batch, prefill time of a batch, both of the scored runs; a ratio above 1 is "
    "faster than dense, and there is none where device, batch or mode differ. Bytes per step: weights and what the "
    "batch reads of its KV caches. Floor and MBU come from the bench at this length and batch, on the same device.",
    "The stride is the mean over layers that refresh, and its range. A first answer token comes from prefill: few "
    "policy steps test little.",
)


@dataclass(frozen=True)
class Table:
    """`groups` are questions and their columns. A row of one text is a heading within the table."""

    title: str
    first: str
    groups: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    prose: bool = False  # texts, not numbers


def report(runs: list[Path], out: Path) -> Path:
    """Writes `out`, or `out/report.html` if `out` is not named .html; beside it Markdown of the tables and CSV of each
    picture, all with the page's name in front. Returns the page.

    Raises ValueError without runs, and as `read_runs` and `change`.
    """
    if not runs:
        raise ValueError("runs=[] is empty; expected at least one folder")
    page = out if out.suffix == ".html" else out / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    read = read_runs(runs)
    tables = [*_headline(read), *_bench(read), _settings(read)]
    drawn, missing = pictures(read)
    for picture in drawn:
        file = page.with_name(f"{page.stem}_{picture.name}.csv")
        file.write_text(_csv(picture), encoding="utf-8")
    failures = _failures(read)
    page.with_suffix(".md").write_text(_markdown(read, tables, [*failures, *missing]), encoding="utf-8")
    page.write_text(_page(read, tables, drawn, missing, failures, page.stem), encoding="utf-8")
    return page


def _headline(runs: Sequence[Run]) -> list[Table]:
    keys = sorted({key for run in runs for key in run.cells})
    of_perplexity = [key for key in keys if any(key in run.cells and run.cells[key].perplexity for run in runs)]
    scored = [key for key in keys if key not in of_perplexity]
    parts = (
        ("Scores", [key for key in scored if not key[0].startswith("rs_")], _SCORES, ()),
        (
            "Scores, RULER-style tasks",
            [key for key in scored if key[0].startswith("rs_")],
            _SCORES,
            (RULER_STYLE + ".",),
        ),
        ("Perplexity", of_perplexity, _PERPLEXITIES, ()),
    )
    tables = []
    for title, chosen, groups, notes in parts:
        rows: list[list[str]] = []
        for key in chosen:
            style = f" ({RULER_STYLE})" if key[0].startswith("rs_") else ""
            rows.append([f"{key[0]}, {key[1]} tokens{style}"])
            named = [(run, label) for run, label in zip(runs, labels(runs), strict=True) if key in run.cells]
            for run, label in sorted(named, key=lambda pair: not pair[0].config.dense):
                rows.append([label, *_answers(run, dense_of(run, runs, key), key)])
        if rows:
            tables.append(Table(title, "policy", groups, rows, notes))
    return tables


def _answers(run: Run, dense: Run | None, key: tuple[str, int]) -> list[str]:
    cell, beside = run.cells[key], dense.cells[key] if dense else None
    return [*_quality(cell, beside), *_cost(run, dense, key), *_behaviour(cell, beside)]


def _quality(cell: Cell, dense: Cell | None) -> list[str]:
    found = change(cell, dense) if dense else None
    if cell.perplexity:
        count = sum(one.nll is not None for one in cell.predictions.values())
        ceiling = _shown(perplexity(dense) if dense else None, ".3f")
        ratio = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}], {found.n}" if found else NONE
        return [f"{_shown(perplexity(cell), '.3f')}, {count}", ceiling, ratio]
    score = mean_score(cell)
    if score is None:
        return [f"failed: {cell.error}" if cell.error else NONE, NONE, NONE, NONE]
    metrics = cell.metrics
    interval = f" [{metrics.interval[0]:.1f}, {metrics.interval[1]:.1f}]" if metrics and metrics.interval else ""
    wrong = {name: getattr(metrics, name) for name in ("failed", "underfilled", "empty")} if metrics else {}
    told = "".join(f", {count} {name}" for name, count in wrong.items() if count)
    own = f"{score:.1f}{interval}, {len(cell.predictions)}{told}"
    if dense is None or found is None:
        return [own, NONE, NONE, NONE]
    common = [one.score or 0.0 for line, one in dense.predictions.items() if line in cell.predictions]
    ceiling = statistics.mean(common)
    retention = f"{100 * (1 + found.value / ceiling):.1f} %" if ceiling >= LEAST_CEILING else "ceiling too low"
    points = f"{signed(found.value)} [{signed(found.low)}, {signed(found.high)}], {found.n}"
    return [own, f"{ceiling:.1f}", retention, points]


def _cost(run: Run, dense: Run | None, key: tuple[str, int]) -> list[str]:
    metrics = run.cells[key].metrics
    if metrics is None:
        return [NONE] * 8
    beside = dense.cells[key].metrics if dense else None
    ratio = decode_ratio(run, dense, key) if dense else None
    both = ratio is not None and beside and beside.prefill_ms and metrics.prefill_ms
    prefill = (
        beside.prefill_ms / metrics.prefill_ms if both and beside and beside.prefill_ms and metrics.prefill_ms else None
    )
    measured = run.config.mode == "gather"
    read, batch, weights = metrics.kv_bytes_per_step, metrics.batch, metrics.weight_bytes
    moved = weights + batch * read if read is not None and batch is not None and weights is not None else None
    full = metrics.dense_kv_bytes_per_step
    bench = _bench_of(run, key[1], batch)
    return [
        _shown(metrics.decode_ms_per_step if measured else None, ".2f"),
        _shown(ratio, ".2f", "×"),
        _shown(metrics.prefill_ms if measured else None, ".1f"),
        _shown(prefill, ".2f", "×"),
        shown_bytes(moved) if moved is not None else NONE,
        _shown(100 * read / full if read is not None and full else None, ".1f", " %"),
        _shown(bench.floor_ms if bench else None, ".3f"),
        _shown(bench.mbu if bench else None, ".2f"),
    ]


def _bench_of(run: Run, length: int, batch: int | None) -> Bench | None:
    alike = (one for one in run.bench if one.policy == run.config.policy and one.device == run.device)
    same = (one for one in alike if one.length == length and one.batch == batch)
    return next((one for one in same if one.valid and one.kind == "measured"), None)


def _behaviour(cell: Cell, dense: Cell | None) -> list[str]:
    metrics = cell.metrics
    tokens = [one.gen_tokens for one in cell.predictions.values() if one.gen_tokens is not None]
    theirs = dense.predictions if dense and not cell.perplexity else {}
    pairs = [(one, theirs[line]) for line, one in cell.predictions.items() if line in theirs]
    counted = [(a.gen_tokens, b.gen_tokens) for a, b in pairs if a.gen_tokens is not None and b.gen_tokens]
    longer = sum(a for a, _ in counted) / sum(b for _, b in counted) if counted else None
    equal = statistics.mean(a.pred == b.pred for a, b in pairs) if pairs else None
    return [
        _strides(cell),
        _shown(_mean(metrics.overlap if metrics else ()), ".2f"),
        _shown(_mean(metrics.coverage if metrics else ()), ".2f"),
        _shown(_mean(tokens), ".1f"),
        _shown(longer, ".2f", "×"),
        _shown(100 * metrics.limit_share if metrics and metrics.limit_share is not None else None, ".0f", " %"),
        _shown(100 * equal if equal is not None else None, ".0f", " %"),
        _shown(metrics.policy_steps if metrics else None, ".1f"),
    ]


def _strides(cell: Cell) -> str:
    mean = mean_stride(cell)
    if mean is None:
        return "no refresh" if cell.metrics and cell.metrics.effective_stride else NONE
    some = [one for one in (cell.metrics.effective_stride if cell.metrics else ()) if one is not None]
    return f"{mean:.1f}" if min(some) == max(some) else f"{mean:.1f} ({min(some):.1f}–{max(some):.1f})"


def _bench(runs: Sequence[Run]) -> list[Table]:
    """A table for each device and kind of number, which are never mixed."""
    columns = (
        ("Time", ("decode ms [10th, 90th]", "dense", "ratio", "prefill ratio")),
        ("Bytes", ("bytes per step", "floor ms", "MBU", "ideal ratio")),
        ("Schedule", ("effective stride",)),
        ("Record", ("state",)),
    )
    lines: dict[tuple[str, str], list[tuple[int, int, list[str]]]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        for one in run.bench:
            name = bench_label(one, run, label)
            told = [f"{name}, {one.mode} mode, {one.weights} weights", *_timed(one)]
            lines.setdefault((one.device, one.kind), []).append((one.length, one.batch, told))
    tables = []
    for (device, kind), found in lines.items():
        rows: list[list[str]] = []
        for length, batch in sorted({(length, batch) for length, batch, _ in found}):
            rows.append([f"{length} tokens, batch {batch}"])
            rows += [row for at, size, row in found if (at, size) == (length, batch)]
        what = "measured" if kind == "measured" else "estimated, not measured"
        tables.append(Table(f"Decode time, {what}, {device}", "policy", columns, rows))
    return tables


def _timed(one: Bench) -> list[str]:
    strides = [stride for stride in one.effective_stride if stride is not None]
    times = f"{one.decode[1]:.2f} [{one.decode[0]:.2f}, {one.decode[2]:.2f}]" if one.decode and one.valid else NONE
    return [
        times,
        _shown(one.dense_decode[1] if one.dense_decode else None, ".2f"),
        _shown(one.ratio_decode if one.valid else None, ".2f", "×"),
        _shown(one.ratio_prefill if one.valid else None, ".2f", "×"),
        shown_bytes(one.bytes_per_step) if one.bytes_per_step is not None else NONE,
        _shown(one.floor_ms, ".3f"),
        _shown(one.mbu if one.valid else None, ".2f"),
        _shown(one.ideal_speedup, ".2f", "×"),
        _shown(_mean(strides), ".1f"),
        one.status if one.status != "ok" or one.valid else "void: dense runs drifted",
    ]


def _settings(runs: Sequence[Run]) -> Table:
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        model, values = run.config.model, run.config.values
        knobs = [f"{name} {value}" for name, value in flat(run.config.policy).items() if name != "name"]
        known = ("schema", "hash", "model", "policy", "mode", "question")
        others = [
            f"{name} {value}" for name, value in flat({k: v for k, v in values.items() if k not in known}).items()
        ]
        batches = dict.fromkeys(str(one["batch"]) for one in run.invocations if one.get("batch") is not None)
        versions = dict.fromkeys(
            f"{name} {version}" for one in run.invocations for name, version in (one.get("versions") or {}).items()
        )
        rows.append(
            [
                label,
                run.path.name,
                ", ".join(knobs) or NONE,
                f"{run.config.mode} mode, question: {run.config.question}",
                ", ".join(f"{name} {value}" for name, value in model.items()),
                ", ".join(others) or NONE,
                f"{run.device}, batch {', '.join(batches) or NONE}",
                ", ".join(versions) or NONE,
                "; ".join(f"{one.get('started')} {one.get('command')}" for one in run.invocations) or NONE,
            ]
        )
    columns = ("folder", "policy", "mode", "model", "other settings", "device", "versions", "started, command")
    return Table("Settings", "run", [("", columns)], rows, prose=True)


def _failures(runs: Sequence[Run]) -> list[str]:
    return [
        f"Failed: {task} {length} of {label}: {cell.error}"
        for run, label in zip(runs, labels(runs), strict=True)
        for (task, length), cell in run.cells.items()
        if cell.error is not None
    ]


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def _mean(values: Iterable[float | None]) -> float | None:
    some = [one for one in values if one is not None]
    return statistics.mean(some) if some else None


def _title(runs: Sequence[Run]) -> str:
    return f"Evaluation of {', '.join(dict.fromkeys(str(run.config.model.get('name')) for run in runs))}"


def _csv(picture: Picture) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(picture.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(picture.rows)
    return file.getvalue()


def _markdown(runs: Sequence[Run], tables: Sequence[Table], remarks: Sequence[str]) -> str:
    parts = [f"# {_title(runs)}"]
    for table in tables:
        header = [table.first, *(column for _, columns in table.groups for column in columns)]
        parts.append(f"## {table.title}")
        parts += table.notes
        for heading, rows in _sections(table):
            parts += [f"### {heading}"] if heading else []
            parts.append(markdown_table(header, rows))
    parts += [*_HEADLINE_NOTES, *(f"- {remark}" for remark in remarks)]
    return "\n\n".join(parts) + "\n"


def _sections(table: Table) -> list[tuple[str, list[Sequence[str]]]]:
    sections: list[tuple[str, list[Sequence[str]]]] = []
    for row in table.rows:
        if len(row) == 1:
            sections.append((row[0], []))
        else:
            sections = sections or [("", [])]
            sections[-1][1].append(row)
    return sections


def _page(
    runs: Sequence[Run],
    tables: Sequence[Table],
    drawn: Sequence[Picture],
    missing: Sequence[str],
    failures: Sequence[str],
    stem: str,
) -> str:
    devices = ", ".join(dict.fromkeys(run.device for run in runs))
    modes = ", ".join(dict.fromkeys(run.config.mode for run in runs))
    contents = [*((f"t{i}", table.title) for i, table in enumerate(tables)), ("pictures", "Pictures")]
    links = " · ".join(f'<a href="#{anchor}">{html.escape(name)}</a>' for anchor, name in contents)
    *results, settings = [_section(f"t{i}", table) for i, table in enumerate(tables)]
    remarks = "".join(f"<p class=failure>{html.escape(one)}</p>" for one in failures)
    notes = "".join(f"<p class=note>{html.escape(one)}</p>" for one in _HEADLINE_NOTES)
    left_out = "".join(f"<li>{html.escape(one)}</li>" for one in missing)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(_title(runs))}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{html.escape(_title(runs))}</h1>
<p class=lead>{len(runs)} runs; scores in {html.escape(modes)} mode on {html.escape(devices)}.</p>
<nav>{links}</nav>
{remarks}
{"".join(results)}
{notes}
<h2 id="pictures">Pictures</h2>
{"".join(_figure(picture, stem) for picture in drawn)}
{f"<ul class=note>{left_out}</ul>" if missing else ""}
{settings}
</body>
</html>
"""


def _section(anchor: str, table: Table) -> str:
    width = 1 + sum(len(columns) for _, columns in table.groups)
    groups = "".join(f'<th colspan="{len(columns)}">{html.escape(name)}</th>' for name, columns in table.groups)
    head = f"<tr class=groups><th></th>{groups}</tr>" if any(name for name, _ in table.groups) else ""
    firsts = {sum(len(columns) for _, columns in table.groups[:place]) for place in range(len(table.groups))}
    columns = [column for _, of_group in table.groups for column in of_group]
    names = "".join(_cell("th", name, place in firsts) for place, name in enumerate(columns))
    body = ""
    for row in table.rows:
        if len(row) == 1:
            body += f'<tr class=heading><th colspan="{width}"><span>{html.escape(row[0])}</span></th></tr>\n'
        else:
            cells = "".join(_cell("td", text, place in firsts) for place, text in enumerate(row[1:]))
            body += f"<tr><th>{html.escape(row[0])}</th>{cells}</tr>\n"
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in table.notes)
    kind = "prose" if table.prose else "numbers"
    return (
        f'<h2 id="{anchor}">{html.escape(table.title)}</h2>{notes}\n<div class=scroll><table class={kind}>'
        f"<thead>{head}<tr><th>{html.escape(table.first)}</th>{names}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _cell(tag: str, text: str, first: bool) -> str:
    return f"<{tag}{' class=first' if first else ''}>{html.escape(text)}</{tag}>"


def _figure(picture: Picture, stem: str) -> str:
    file = io.BytesIO()
    # the salt makes the same picture the same bytes
    with matplotlib.rc_context({"svg.hashsalt": picture.name}):
        picture.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    image = _inline("image/svg+xml", file.getvalue())
    data = _inline("text/csv", _csv(picture).encode())
    name = f"{stem}_{picture.name}.csv"
    link = f'<a download="{name}" href="{data}">{name}</a>'
    title = html.escape(picture.title)
    return (
        f'<figure id="{picture.name}"><h3>{title}</h3>\n<img alt="{title}" src="{image}">\n'
        f"<figcaption>{html.escape(picture.caption)} {link}</figcaption></figure>\n"
    )


def _inline(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 1180px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; } .lead { color: #555; margin: 0 0 .6rem; }
nav { font-size: .9rem; } a { color: #0b5a94; text-decoration: none; } a:hover { text-decoration: underline; }
.note, figcaption { color: #555; font-size: .86rem; max-width: 60rem; margin: .35rem 0; }
ul.note { padding-left: 1.2rem; }
.failure { color: #8a1c00; background: #fff3ee; padding: .4rem .7rem; border-left: 3px solid #d55e00; }
.scroll { overflow-x: auto; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap; font-weight: normal; }
thead th { color: #555; border-bottom: 1px solid #ccc; vertical-align: bottom; }
.groups th { color: #1c1c1c; font-weight: 600; text-align: left; border-bottom: none; border-left: 1px solid #e2e2e2; }
.groups th:first-child { border-left: none; } .first { border-left: 1px solid #e2e2e2; }
tr > th:first-child { text-align: left; position: sticky; left: 0; background: #fff; z-index: 1; }
tbody th { font-weight: 600; } tbody tr:hover > * { background: #f6f9fc; }
tbody tr.heading th { background: #f3f4f6; padding-top: .35rem; } .heading span { position: sticky; left: .6rem; }
.prose td { text-align: left; white-space: normal; min-width: 9rem; vertical-align: top; overflow-wrap: anywhere; }
.prose th { vertical-align: top; text-align: left; }
figure { margin: 1.8rem 0; } figure img { max-width: 100%; height: auto; display: block; }
@media print { .scroll { overflow: visible; } figure { break-inside: avoid; } }
"""
