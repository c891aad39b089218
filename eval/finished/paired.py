"""Two finished runs beside each other, paired by example."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.finished.means import by_line
from eval.finished.run import Cell, Prediction, Run
from eval.metrics import RESAMPLES, paired_interval


@dataclass(frozen=True)
class Change:
    """What a cell has over another one's, with its 95 % interval: points of score, or the ratio of perplexities. `n`
    counts the examples compared; where they are not paired, the smaller of both numbers."""

    value: float
    low: float
    high: float
    n: int


def change(ours: Cell, theirs: Cell, *, paired: bool = True) -> Change | None:
    """Of one cell over another; None if they have no example in common. Raises ValueError as
    `check_same_examples`, unless not `paired`, and as `by_line`."""
    if paired:
        check_same_examples(ours, theirs)
    mine, other = by_line(ours), by_line(theirs)
    if paired:
        common = sorted(mine.keys() & other.keys())
        mine, other = {line: mine[line] for line in common}, {line: other[line] for line in common}
    if not mine or not other:
        return None
    a, b = list(mine.values()), list(other.values())
    low, high = paired_interval(a, b) if paired else _unpaired_interval(a, b)
    value = float(np.mean(a) - np.mean(b))
    if ours.of_perplexity:
        value, low, high = math.exp(value), math.exp(low), math.exp(high)
    return Change(value, low, high, min(len(a), len(b)))


def check_same_examples(ours: Cell, theirs: Cell) -> None:
    """By the hashes, or by the references where a file of RULER's has none. Raises ValueError."""
    cell = f"cell {ours.task} {ours.length}"
    if ours.predictions and theirs.predictions and ours.of_perplexity != theirs.of_perplexity:
        raise ValueError(f"{cell} has perplexities in one run and scores in another")
    if ours.hash is None or theirs.hash is None:
        for line in sorted(ours.predictions.keys() & theirs.predictions.keys()):
            if ours.predictions[line].outputs != theirs.predictions[line].outputs:
                raise ValueError(f"{cell} has other references in line {line}; compare with unpaired")
    elif ours.hash != theirs.hash:
        raise ValueError(f"{cell} has the hashes {theirs.hash} and {ours.hash}; expected the same, or unpaired")


def decode_ratio(ours: Run, theirs: Run, key: tuple[str, int]) -> float | None:
    """Their time of a decode step over ours, above 1 if we are faster. None unless both were measured in gather mode,
    at one batch, on one kind and number of devices."""
    a, b = (run.cells[key].metrics for run in (ours, theirs))
    if any(run.config.mode != "gather" for run in (ours, theirs)) or ours.device != theirs.device:
        return None
    if a is None or b is None or a.batch != b.batch or not a.decode_ms_per_step or not b.decode_ms_per_step:
        return None
    return b.decode_ms_per_step / a.decode_ms_per_step


def dense_of(run: Run, runs: Iterable[Run], key: tuple[str, int]) -> Run | None:
    """The dense run with the same examples, question, weights and sampling; None for a dense run itself."""
    if run.config.dense:
        return None
    for other in runs:
        if other.config.dense and key in other.cells and _settings(other) == _settings(run):
            check_same_examples(run.cells[key], other.cells[key])
            return other
    return None


def same_examples(ours: Cell, theirs: Cell) -> list[tuple[Prediction, Prediction]]:
    """Both answers to each line that both have."""
    return [(one, theirs.predictions[i]) for i, one in ours.predictions.items() if i in theirs.predictions]


def output_tokens(ours: Cell, theirs: Cell) -> list[tuple[int, int]]:
    """How many tokens both have written for the same example, where theirs are any."""
    both = [(a.gen_tokens, b.gen_tokens) for a, b in same_examples(ours, theirs)]
    return [(a, b) for a, b in both if a is not None and b]


def _settings(run: Run) -> str:
    """What the policy's run and the dense one have to share."""
    names = ("model", "question", "template", "sampling")
    return json.dumps([run.config.values.get(name) for name in names], sort_keys=True)


def _unpaired_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """As a paired one, with both resampled on their own."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, size=(RESAMPLES, len(values))).mean(axis=1) for values in (ours, theirs)]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return float(low), float(high)
