"""Pictures of finished runs. Each is drawn from its rows, which are written beside it: no row, no point."""

from collections.abc import Callable, Sequence

from eval.finished.run import Run
from eval.report.pictures.bench import bench_curves
from eval.report.pictures.needle import needle_maps
from eval.report.pictures.output_length import output_length
from eval.report.pictures.perplexity import perplexity_by_position
from eval.report.pictures.picture import Picture
from eval.report.pictures.schedule import coverage_by_age, overlap_by_layer, stride_by_layer
from eval.report.pictures.scores import score_against_budget, score_against_latency
from eval.report.pictures.shown import Shown, show

# What is drawn, in this order, and why there may be nothing to draw.
_KINDS: Sequence[tuple[str, Callable[[Sequence[Shown]], list[Picture]], str]] = (
    ("Score against budget", score_against_budget, "no scored run has a budget k"),
    ("Score against measured latency", score_against_latency, "no scored run in gather mode has a decode time"),
    (
        "Perplexity ratio against generated position",
        perplexity_by_position,
        "no perplexities of a policy and of the dense one on the same documents",
    ),
    ("Effective stride per layer", stride_by_layer, "no run has refreshed"),
    ("Needle heat maps", needle_maps, "no task has scores at several depths"),
    ("Coverage against steps since the refresh", coverage_by_age, "no telemetry has coverage, which needs mask mode"),
    ("Overlap of selections per layer", overlap_by_layer, "no run has measured overlaps"),
    ("Output length against dense", output_length, "no policy has answered the dense run's examples"),
    ("Decode time against length", bench_curves, "no run has valid records in bench.jsonl"),
)


def pictures(runs: Sequence[Run]) -> tuple[list[Picture], list[str]]:
    """All that there are data for, and one line for each kind left out."""
    shown, drawn, missing = show(runs), [], []
    for title, draw, reason in _KINDS:
        found = draw(shown)
        drawn += found
        if not found:
            missing.append(f"{title}: left out, {reason}.")
    return drawn, missing
