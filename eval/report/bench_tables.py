"""Tables of how long decode steps take, from the records of benchmarks."""

from collections.abc import Sequence

from eval.finished.means import mean
from eval.finished.names import bench_label, labels
from eval.finished.run import Bench, Run
from eval.finished.text import NONE, shown, shown_bytes
from eval.report.content import Table


def bench_tables(runs: Sequence[Run]) -> list[Table]:
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
    times = f"{one.decode[1]:.2f} [{one.decode[0]:.2f}, {one.decode[2]:.2f}]" if one.decode and one.valid else NONE
    return [
        times,
        shown(one.dense_decode[1] if one.dense_decode else None, ".2f"),
        shown(one.ratio_decode if one.valid else None, ".2f", "×"),
        shown(one.ratio_prefill if one.valid else None, ".2f", "×"),
        shown_bytes(one.bytes_per_step),
        shown(one.floor_ms, ".3f"),
        shown(one.mbu if one.valid else None, ".2f"),
        shown(one.ideal_speedup, ".2f", "×"),
        shown(mean(one.effective_stride), ".1f"),
        one.status if one.status != "ok" or one.valid else "void: dense runs drifted",
    ]
