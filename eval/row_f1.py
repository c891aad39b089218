"""F1 over the rows of a table written as tab-separated text, after HTML → TSV of LongProc (Ye et al., 2025).

Rows match whole and in any order. `score` counts a row as often as it stands in both tables; LongProc counts it as
right whenever it stands in the other one (`row_f1_set`), however often a policy that loops has written it.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FENCE = "```"
_OPENING = re.compile("```tsv", re.IGNORECASE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table as compared: cells in the form of `normalised`, the header only as its number of columns."""

    columns: int
    rows: tuple[Row, ...]

    @property
    def regular(self) -> list[Row]:
        """The rows with as many cells as the header. Others are predicted too, and wrong."""
        return [row for row in self.rows if len(row) == self.columns]


def row_f1(answer: str, outputs: Sequence[str], meta: Mapping[str, Any]) -> dict[str, float]:
    """The answer's table against that of the only reference.

    `score` is 100 × F1 with the intersection of multisets, `precision` and `recall` (0 to 100) are its parts and
    `row_f1_set` is LongProc's F1, also 0 to 100. `rows_predicted` counts rows; `repeat_share` is the share of them, 0
    to 1, that has stood further up already; `parsed` is 1 if a row has the reference's number of cells, as its header
    does, else 0. Raises ValueError when the reference has no rows.
    """
    gold, ours = read_table(outputs[0]), read_table(answer)
    if not gold.regular:
        raise ValueError(
            f"outputs[0]={outputs[0][:80]!r} has no rows, expected a table with a header and a row or more"
        )
    right, wanted = Counter(ours.regular), Counter(gold.regular)
    both = (right & wanted).total()
    predicted, expected = len(ours.rows), len(gold.regular)
    precision, recall = _percent(both, predicted), _percent(both, expected)
    ours_in_gold = sum(count for row, count in right.items() if row in wanted)
    gold_in_ours = sum(count for row, count in wanted.items() if row in right)
    return {
        "score": _f1(precision, recall),
        "row_f1_set": _f1(_percent(ours_in_gold, predicted), _percent(gold_in_ours, expected)),
        "precision": precision,
        "recall": recall,
        "rows_predicted": float(predicted),
        "repeat_share": 1 - len(set(ours.rows)) / predicted if predicted else 0.0,
        "parsed": float(ours.columns == gold.columns and bool(ours.regular)),
    }


def read_table(text: str) -> Table:
    """The table in the code fence marked `tsv`, after a fence that is not closed, or in the whole text up to a fence.

    Its first line is the header. A last line of another number of cells is dropped: the limit of tokens cut it off, or
    it is a remark. Empty lines around the table do not count; one within is a row.
    """
    opening = _OPENING.search(text)
    inside = text[opening.end() if opening else 0 :].split(_FENCE, 1)[0]
    lines = inside.strip(" \r\n").split("\n")  # a tab at an end stays: the cell beyond it is empty
    header, *rows = [tuple(normalised(cell) for cell in line.split("\t")) for line in lines]
    if rows and len(rows[-1]) != len(header):
        rows.pop()
    return Table(len(header), tuple(rows))


def normalised(cell: str) -> str:
    """The cell in lower case, without ASCII punctuation, English articles and white space, dropped in this order, as
    in LongProc; entities such as `&amp;` are not resolved."""
    plain = cell.lower().translate(_PUNCTUATION)
    return "".join(_ARTICLES.sub(" ", plain).split())


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
