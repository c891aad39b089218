"""Tables of what the runs score and cost, each policy beside the dense one."""

import statistics
from collections.abc import Sequence

from eval.finished.means import mean, mean_score, perplexity
from eval.finished.names import labels
from eval.finished.paired import change, decode_ratio, dense_of, output_tokens, same_examples
from eval.finished.run import Bench, Cell, Run
from eval.finished.text import NONE, RULER_STYLE, ruler_style, shown, shown_bytes, signed
from eval.metrics import LEAST_CEILING
from eval.report.content import Table

Groups = Sequence[tuple[str, Sequence[str]]]
# The questions of a report and the columns that answer them, for scores and for perplexities.
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
SCORE_NOTES = (
    "Dense is the policy that always reads everything; its score on the same examples is the ceiling. Retention is the "
    f"score in percent of it; below a dense score of {LEAST_CEILING} there is none. Differences and ratios are paired "
    "by example. With 100 examples and a score of 90 the interval reaches about 6 points to each side.",
    "Decode time is of a step of the whole batch, prefill time of a batch, both of the scored runs; a ratio above 1 is "
    "faster than dense, and there is none where device, batch or mode differ. A cell whose batches all had to compile "
    "has no times: give it examples for two batches. Bytes per step: weights and what the batch reads of its KV "
    "caches. Floor and MBU come from the bench at this length and batch, on the same device.",
    "The stride is the mean over layers that refresh, and its range. A first answer token comes from prefill: few "
    "policy steps test little.",
)


def score_tables(runs: Sequence[Run]) -> list[Table]:
    """One for each kind of task that there is; in each, a section for each task and length, the dense policy first."""
    keys = sorted({key for run in runs for key in run.cells})
    of_perplexity = [key for key in keys if any(key in run.cells and run.cells[key].of_perplexity for run in runs)]
    scored = [key for key in keys if key not in of_perplexity]
    tables = (
        _table(runs, "Scores", [key for key in scored if not ruler_style(key[0])], _SCORES),
        _table(runs, "Scores, RULER-style tasks", [key for key in scored if ruler_style(key[0])], _SCORES),
        _table(runs, "Perplexity", of_perplexity, _PERPLEXITIES),
    )
    return [table for table in tables if table.rows]


def _table(runs: Sequence[Run], title: str, keys: Sequence[tuple[str, int]], groups: Groups) -> Table:
    """`groups` begin with that of quality."""
    rows: list[list[str]] = []
    for key in keys:
        style = f" ({RULER_STYLE})" if ruler_style(key[0]) else ""
        rows.append([f"{key[0]}, {key[1]} tokens{style}"])
        named = [(run, label) for run, label in zip(runs, labels(runs), strict=True) if key in run.cells]
        for run, label in sorted(named, key=lambda pair: not pair[0].config.dense):
            dense = dense_of(run, runs, key)
            cell, beside = run.cells[key], dense.cells[key] if dense else None
            quality = _quality(cell, beside)
            missing = [NONE] * (len(groups[0][1]) - len(quality))
            rows.append([label, *quality, *missing, *_cost(run, dense, key), *_behaviour(cell, beside)])
    notes = (RULER_STYLE + ".",) if any(ruler_style(task) for task, _ in keys) else ()
    return Table(title, "policy", groups, rows, notes)


def _quality(cell: Cell, dense: Cell | None) -> list[str]:
    """What there is to tell of it, from the left."""
    found = change(cell, dense) if dense else None
    if cell.of_perplexity:
        count = sum(one.nll is not None for one in cell.predictions.values())
        ceiling = shown(perplexity(dense) if dense else None, ".3f")
        ratio = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}], {found.n}" if found else NONE
        return [f"{shown(perplexity(cell), '.3f')}, {count}", ceiling, ratio]
    score = mean_score(cell)
    if score is None:
        return [f"failed: {cell.error}" if cell.error else NONE]
    metrics = cell.metrics
    interval = f" [{metrics.interval[0]:.1f}, {metrics.interval[1]:.1f}]" if metrics and metrics.interval else ""
    wrong = {name: getattr(metrics, name) for name in ("failed", "underfilled", "empty")} if metrics else {}
    told = "".join(f", {count} {name}" for name, count in wrong.items() if count)
    own = f"{score:.1f}{interval}, {len(cell.predictions)}{told}"
    if dense is None or found is None:
        return [own]
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
    prefill = None
    if ratio is not None and beside and beside.prefill_ms and metrics.prefill_ms:
        prefill = beside.prefill_ms / metrics.prefill_ms
    measured = run.config.mode == "gather"
    read, batch, weights = metrics.kv_bytes_per_step, metrics.batch, metrics.weight_bytes
    moved = weights + batch * read if read is not None and batch is not None and weights is not None else None
    full = metrics.dense_kv_bytes_per_step
    bench = _bench_of(run, key[1], batch)
    return [
        shown(metrics.decode_ms_per_step if measured else None, ".2f"),
        shown(ratio, ".2f", "×"),
        shown(metrics.prefill_ms if measured else None, ".1f"),
        shown(prefill, ".2f", "×"),
        shown_bytes(moved),
        shown(100 * read / full if read is not None and full else None, ".1f", " %"),
        shown(bench.floor_ms if bench else None, ".3f"),
        shown(bench.mbu if bench else None, ".2f"),
    ]


def _bench_of(run: Run, length: int, batch: int | None) -> Bench | None:
    alike = (one for one in run.bench if one.policy == run.config.policy and one.device == run.device)
    same = (one for one in alike if one.length == length and one.batch == batch)
    return next((one for one in same if one.valid and one.kind == "measured"), None)


def _behaviour(cell: Cell, dense: Cell | None) -> list[str]:
    metrics = cell.metrics
    tokens = [one.gen_tokens for one in cell.predictions.values() if one.gen_tokens is not None]
    compared = dense if not cell.of_perplexity else None
    counted = output_tokens(cell, compared) if compared else []
    longer = sum(a for a, _ in counted) / sum(b for _, b in counted) if counted else None
    equal = mean(a.pred == b.pred for a, b in same_examples(cell, compared)) if compared else None
    return [
        _strides(cell),
        shown(mean(metrics.overlap if metrics else ()), ".2f"),
        shown(mean(metrics.coverage if metrics else ()), ".2f"),
        shown(mean(tokens), ".1f"),
        shown(longer, ".2f", "×"),
        shown(100 * metrics.limit_share if metrics and metrics.limit_share is not None else None, ".0f", " %"),
        shown(100 * equal if equal is not None else None, ".0f", " %"),
        shown(metrics.policy_steps if metrics else None, ".1f"),
    ]


def _strides(cell: Cell) -> str:
    some = [one for one in cell.effective_stride if one is not None]
    if not some:
        return "no refresh" if cell.effective_stride else NONE
    spread = "" if min(some) == max(some) else f" ({min(some):.1f}–{max(some):.1f})"
    return shown(mean(some), ".1f", spread)
