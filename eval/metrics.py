"""From an answer to a score: the metrics of generated tasks, from 0 to 100 per example, and intervals of their means.

`all` and `part` are those of RULER (Hsieh et al., 2024, in its code `string_match_all` and `string_match_part`), which
rounds their means to two decimals.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.row_f1 import row_f1

# (answer, references, what the example says about itself) → {"score": 0 to 100, and what else there is to know}
Metric = Callable[[str, Sequence[str], Mapping[str, Any]], dict[str, float]]

RESAMPLES = 10_000
LEAST_CEILING = 20  # a dense score below it says nothing about what a policy retains
_CONTROL = re.compile(r"[\x00-\x1f]")
_AROUND_A_KEY = " \t.;:'\"`()[]"


def clean(answer: str) -> str:
    """The answer without white space around it, control characters as line ends: what RULER compares. An answer of
    which nothing is left is one of its Nulls."""
    return _CONTROL.sub("\n", answer.strip()).strip()


def match_all(answer: str, outputs: Sequence[str], meta: Mapping[str, Any]) -> dict[str, float]:
    """Percentage of the references that the answer contains, whatever their case; one listed twice counts twice."""
    found = _found(answer, outputs)
    return {"score": 100 * sum(found) / len(found)}


def match_part(answer: str, outputs: Sequence[str], meta: Mapping[str, Any]) -> dict[str, float]:
    """100 if the answer contains any of the references, whatever their case."""
    return {"score": 100.0 * any(_found(answer, outputs))}


def match_part_lmeval(answer: str, outputs: Sequence[str], meta: Mapping[str, Any]) -> dict[str, float]:
    """What lm-evaluation-harness 0.4.13 makes of `part`: it takes the largest over answers, of which it sees one at a
    time, so that what remains is the mean over references."""
    return match_all(answer, outputs, meta)


def passkey(answer: str, outputs: Sequence[str], meta: Mapping[str, Any]) -> dict[str, float]:
    """100 if the first integer of the answer is the key, which is the only reference; leading zeros do not count."""
    first = re.search("[0-9]+", answer)
    # Compared as text: an answer may be thousands of digits long, which int() refuses.
    return {"score": 100.0 * (first is not None and first.group().lstrip("0") == outputs[0].lstrip("0"))}


def chain_of_key(answer: str, outputs: Sequence[str], meta: Mapping[str, Any]) -> dict[str, float]:
    """Percentage of a chain of `meta["chain"]` keys that stands at the front of the answer (RefreshKV, appendix A.6).

    The answer's keys are separated by commas or line ends. The first must be one of `meta["keys"]` and, where
    `meta["start"]` is a word, begin with it; every other one of those keys too, and begin with the last word of the key
    before it. What comes after a wrong key, or after the chain's length, is not read. References are not looked at.
    """
    keys = {key.lower() for key in meta["keys"]}
    word = None if meta["start"] is None else meta["start"].lower()
    valid = 0
    for key in _keys_of(answer)[: meta["chain"]]:
        if key not in keys or (word is not None and key.split("-")[0] != word):
            break
        valid, word = valid + 1, key.split("-")[-1]
    return {"score": 100 * valid / meta["chain"]}


METRICS: Mapping[str, Metric] = {
    "all": match_all,
    "part": match_part,
    "part_lmeval": match_part_lmeval,
    "passkey": passkey,
    "chain_of_key": chain_of_key,
    "row_f1": row_f1,
}


def interval(scores: Iterable[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap over examples of the mean of `scores`, in their unit: lower and upper end, from 10,000
    resamples, the same for the same seed. Raises ValueError without scores."""
    values = np.asarray(list(scores), dtype=float)
    if not len(values):
        raise ValueError("scores is empty, expected one number per example")
    rng = np.random.default_rng(seed)
    # in ten parts, for the memory's sake
    draws = [rng.choice(values, (RESAMPLES // 10, len(values))).mean(axis=1) for _ in range(10)]
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return float(low), float(high)


def paired_interval(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """`interval` of the mean of `ours` − `theirs`, the scores of the same examples in the same order. Raises ValueError
    when they are not equally many, or none."""
    if len(ours) != len(theirs):
        raise ValueError(f"theirs has {len(theirs)} scores, expected {len(ours)} as in ours, of the same examples")
    return interval(np.subtract(ours, theirs), seed=seed)


def _found(answer: str, outputs: Sequence[str]) -> list[bool]:
    text = clean(answer).lower()
    return [output.lower() in text for output in outputs]


def _keys_of(answer: str) -> list[str]:
    pieces = (piece.strip(_AROUND_A_KEY) for piece in re.split("[,\n]", clean(answer).lower()))
    return [piece for piece in pieces if piece]
