"""Files of RULER (Hsieh et al., 2024; github.com/NVIDIA/RULER): its data in, and predictions that it scores unchanged.

Lines count from 0 as keys of examples, and from 1 in messages, as editors show them.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

# In the order of its scripts/synthetic.yaml, which is that of its summaries.
RULER_TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
# How names of tasks begin → name of the metric, tokens of an answer
_FAMILIES = {"niah": ("all", 128), "vt": ("all", 30), "cwe": ("all", 120), "fwe": ("all", 50), "qa": ("part", 32)}


@dataclass(frozen=True)
class RulerExample:
    """One line of a data file. `line` is its key; `index` is whatever the file says, which in the niah files is the
    place of the answer and may repeat."""

    line: int
    index: Any
    input: str
    answer_prefix: str
    outputs: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What the model reads, a template and its special tokens as text included where the file has them."""
        return self.input + self.answer_prefix


@dataclass(frozen=True)
class RulerFile:
    """A data file where RULER's scripts put it: `{root}/{model}/{benchmark}/{length}/data/{task}/validation.jsonl`."""

    path: Path
    model: str
    benchmark: str
    length: int
    task: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """From a path of that shape, which must name a length in digits."""
        task, length = path.parent, path.parents[2]
        return cls(path, length.parents[1].name, length.parent.name, int(length.name), task.name)

    @property
    def predictions(self) -> Path:
        """Where RULER looks for the answers: `{…}/{length}/pred/{task}.jsonl`."""
        return self.path.parents[2] / "pred" / f"{self.task}.jsonl"


@dataclass(frozen=True)
class TaskScore:
    """A column of a summary: mean score (0 to 100), and how many of the `total` answers are empty once cleaned."""

    task: str
    score: float
    empty: int
    total: int


def find_ruler(root: Path) -> list[RulerFile]:
    """The data files below a folder of results, by model, benchmark, length and RULER's order of tasks.

    Raises ValueError when there are none.
    """
    paths = [path for path in root.glob("*/*/*/data/*/validation.jsonl") if path.parents[2].name.isdecimal()]
    if not paths:
        expected = "{model}/{benchmark}/{length}/data/{task}/validation.jsonl"
        raise ValueError(f"root={str(root)!r} has no RULER data, expected files {expected} in it")
    return sorted(
        map(RulerFile.of, paths), key=lambda file: (file.model, file.benchmark, file.length, _place(file.task))
    )


def read_ruler(path: Path) -> list[RulerExample]:
    """The examples of a data file, UTF-8, one JSON object per line: `index`, `input`, `outputs` (a list of texts, or
    else one text `output`), and `answer_prefix`, which older files have at the end of `input` instead.

    Empty lines are passed over, and counted in the keys of those that follow. Raises ValueError, naming file and line,
    for a line that is not such an object.
    """
    return list(_examples(path))


def prediction_record(
    *,
    index: Any,
    pred: str,
    input: str,
    outputs: Sequence[str],
    others: Mapping[str, Any],
    length: int,
    truncation: int = 0,
) -> dict[str, Any]:
    """One line of a file of predictions, as an object for JSON. `input` is the whole prompt, `length` counts tokens of
    prompt and answer, `truncation` is 0 for none and −1 for unknown. What RULER does not know goes into `others`.

    Raises ValueError when `others` has an `id`, which RULER would take for the index.
    """
    if "id" in others:
        raise ValueError(f"others has id={others['id']!r}, expected another name: RULER reads id as the index")
    return {
        "index": index,
        "pred": pred,
        "input": input,
        "outputs": list(outputs),
        "others": dict(others),
        "truncation": truncation,
        "length": length,
    }


def summary_csv(rows: Iterable[TaskScore]) -> str:
    """The text of RULER's `summary.csv`, a column per task: its tasks in its order, then others as they come.

    Scores are rounded to two decimals.
    """
    columns = sorted(rows, key=lambda row: _place(row.task)[0])
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(range(len(columns) + 1))
    lines.writerow(["Tasks", *(row.task for row in columns)])
    lines.writerow(["Score", *(round(float(row.score), 2) for row in columns)])
    lines.writerow(["Nulls", *(f"{row.empty}/{row.total}" for row in columns)])
    return text.getvalue()


def metric_of_task(name: str) -> str:
    """The metric, a name in `eval.metrics.METRICS`, of a task by its RULER name. Raises ValueError for other names."""
    return _FAMILIES[_family(name)][0]


def gen_tokens_of_task(name: str) -> int:
    """How many tokens RULER lets a model answer, by the task's RULER name. Raises ValueError for other names."""
    return _FAMILIES[_family(name)][1]


def _family(name: str) -> str:
    for prefix in _FAMILIES:
        if name.startswith(prefix):
            return prefix
    raise ValueError(f"name={name!r} is no task of RULER, expected one that begins with {', '.join(_FAMILIES)}")


def _place(task: str) -> tuple[int, str]:
    return RULER_TASKS.index(task) if task in RULER_TASKS else len(RULER_TASKS), task


def _examples(path: Path) -> Iterator[RulerExample]:
    with path.open("rb") as file:  # in bytes, whose lines end at "\n" alone
        for number, line in enumerate(file):
            if line.isspace():
                continue
            try:
                example = _example(number, line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number + 1}: {error}") from error
            yield example


def _example(number: int, line: bytes) -> RulerExample:
    try:
        fields = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg}, column {error.colno}), expected one object") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{json.dumps(fields)[:80]} is no object, expected one with index, input and outputs")
    if "index" not in fields:
        raise ValueError("index is missing, expected index, input and outputs")
    outputs = fields["outputs"] if "outputs" in fields else [fields.get("output")]
    if not isinstance(outputs, list) or not outputs:
        raise ValueError(f"outputs={json.dumps(outputs)[:80]}, expected a list of one text or more")
    texts = tuple(_text("outputs", output) for output in outputs)
    prefix = _text("answer_prefix", fields.get("answer_prefix", ""))
    return RulerExample(number, fields["index"], _text("input", fields.get("input")), prefix, texts)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} has {json.dumps(value)[:80]}, expected text")
    return value
