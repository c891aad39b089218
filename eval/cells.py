"""The cells of an evaluation: a task at a length, whose examples are asked for by line."""

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from eval.config import EvalConfig, split
from eval.perplexity import SCORED, Documents
from eval.prompts import Prompts
from eval.ruler_files import RulerExample, find_ruler, gen_tokens_of_task, metric_of_task, read_ruler
from eval.tasks.further import FURTHER
from eval.tasks.further import SMALL as SMALL_FURTHER
from eval.tasks.retrieval import EMBEDDED
from eval.tasks.ruler_style import RULER_STYLE
from eval.tasks.ruler_style import SMALL as SMALL_RULER_STYLE
from eval.tasks.task import Haystack, Task
from recycled_jax.spelling import nearest

TASKS: Mapping[str, Callable[..., Task]] = {**EMBEDDED, **RULER_STYLE, **FURTHER}
SMALL: Mapping[str, Mapping[str, Any]] = {**SMALL_RULER_STYLE, **SMALL_FURTHER}


@dataclass(frozen=True)
class Question:
    """What is asked on one line. `tokens` are read as a prompt; then `fed` tokens, if there are any, go through decode
    steps; then at most `gen_tokens` are generated, or the `follows` tokens are scored. One with an `error` is not."""

    line: int
    index: Any
    input: str
    outputs: tuple[str, ...]
    tokens: tuple[int, ...]
    fed: tuple[int, ...] = ()
    gen_tokens: int = 0
    follows: tuple[int, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None  # why it cannot be asked


@dataclass(frozen=True)
class Cell(ABC):
    """A task at a length; `examples` lines count from 0."""

    task: str
    length: int
    examples: int
    prompts: Prompts = field(repr=False)

    metric: ClassVar[str | None]

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that decides what is asked, as JSON, but not how many examples there are."""

    @abstractmethod
    def question(self, line: int) -> Question:
        """Raises ValueError when it cannot be asked, for instance because it does not fit."""

    @property
    def new_tokens(self) -> int:
        """The room to keep behind the longest prompt."""
        return max(128, self.length // 8)

    @property
    def hash(self) -> str:
        return digest(self.identity)


@dataclass(frozen=True)
class GeneratedCell(Cell):
    """Examples that a task makes. Those of several turns are asked one turn on a line, each after the right answers of
    the turns before, which go through decode steps with the question."""

    made_by: Task
    seed: int
    decode: bool  # the question goes through decode steps

    @property
    def metric(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.made_by.metric

    @property
    def identity(self):
        task = self.made_by
        of_text = {"tokenizer": self.prompts.fingerprint, "template": self.prompts.template}
        return {
            "name": self.task,
            "params": task.params,
            "length": self.length,
            "seed": self.seed,
            "version": task.version,
            "metric": task.metric,
            "question": "decode" if self.decode else "prefill",
            **of_text,
        }

    def question(self, line):
        index, turn = divmod(line, self.made_by.questions)
        example = self.made_by.example(length=self.length, seed=self.seed, index=index, encode=self.prompts.encode)
        if self.made_by.questions > 1:
            asked = example.meta["turns"][turn]
            before = "".join(t["question"] + t["answer_prefix"] + t["gold"] for t in example.meta["turns"][:turn])
            tokens, fed = self.prompts.split(example.context, before + asked["question"], asked["answer_prefix"])
            meta = {"turn": turn + 1, "control": bool(asked.get("control"))}
            text = example.context + before + asked["question"] + asked["answer_prefix"]
            return Question(line, index, text, tuple(asked["outputs"]), tokens, fed, example.gen_tokens, meta=meta)
        text = example.context + example.question
        if self.decode:
            tokens, fed = self.prompts.split(example.context, example.question, example.answer_prefix)
        else:
            tokens, fed = self.prompts.tokens(text, example.answer_prefix), ()
        meta = dict(example.meta)
        return Question(line, index, example.prompt, example.outputs, tokens, fed, example.gen_tokens, meta=meta)


@dataclass(frozen=True)
class RulerCell(Cell):
    """The lines of a file in RULER's format, asked as they stand."""

    path: Path
    sha256: str
    rows: tuple[RulerExample, ...] = field(repr=False)
    gen_tokens: int
    metric: str  # pyright: ignore[reportIncompatibleVariableOverride]
    max_length: int

    @property
    def identity(self):
        return {
            "name": self.task,
            "params": {"gen_tokens": self.gen_tokens, "sha256": self.sha256},
            "length": self.length,
            "metric": self.metric,
            "tokenizer": self.prompts.fingerprint,
            "template": self.prompts.template,
        }

    def question(self, line):
        example = self.rows[line]
        tokens = self.prompts.tokens(example.input, example.answer_prefix)
        error = None
        if len(tokens) + self.gen_tokens > self.max_length:
            error = (
                f"{self.path}, line {example.line + 1}: {len(tokens)} tokens with {self.gen_tokens} to generate, "
                f"expected at most max_length={self.max_length}"
            )
        told = (line, example.index, example.prompt, example.outputs, tokens, (), self.gen_tokens)
        return Question(*told, error=error)


@dataclass(frozen=True)
class PerplexityCell(Cell):
    """Pieces of text, the last tokens of which are scored."""

    documents: Documents
    scored: int = SCORED

    metric: ClassVar[None] = None

    @property
    def identity(self):
        params = {"documents": list(self.documents.digests), "scored": self.scored}
        name = {"name": self.task, "params": params, "length": self.length}
        return {**name, "metric": None, "tokenizer": self.prompts.fingerprint}

    @property
    def new_tokens(self):
        return self.scored

    def question(self, line):
        piece = self.documents.piece(line, self.length)
        cut = len(piece) - self.scored
        return Question(line, line, self.prompts.decode(piece[:cut]), (), piece[:cut], follows=piece[cut:])


def make_cells(config: EvalConfig, prompts: Prompts, max_length: int) -> list[Cell]:
    """Every task at every length.

    Raises ValueError for an unknown task or parameter, a length above `max_length`, and files that hold nothing to ask.
    """
    for length in config.lengths:
        if length > max_length:
            raise ValueError(f"lengths has {length}, expected at most max_length={max_length}")
    cells = list(_cells(config, prompts, max_length))
    names = [(cell.task, cell.length) for cell in cells]
    for task, length in names:
        if names.count((task, length)) > 1:
            raise ValueError(f"tasks has {task} twice at length {length}, expected another name, as {{name: …, as: …}}")
    return cells


def _cells(config: EvalConfig, prompts: Prompts, max_length: int) -> Iterator[Cell]:
    for entry in config.tasks:
        name, params = split(entry)
        params_as = params.pop("as", None)  # where one task stands twice with other parameters
        label = params_as or name
        if name == "ruler":
            yield from _ruler_cells(params, params_as, config, prompts, max_length)
        elif name == "perplexity":
            scored = int(params.pop("scored", SCORED))
            paths = params.pop("documents", ())
            paths = (paths,) if isinstance(paths, str) else paths
            documents = Documents.read(paths, prompts.text.encode, seed=config.seed)
            _nothing_left(name, params)
            for length in config.lengths:
                count = documents.pieces(length, scored, config.examples)
                yield PerplexityCell(label, length, count, prompts, documents, scored)
        else:
            task = _make_task(name, params, config)
            lines = config.examples * task.questions
            decode = config.question == "decode" or task.questions > 1
            for length in config.lengths:
                yield GeneratedCell(label, length, lines, prompts, task, config.seed, decode)


def _make_task(name: str, params: Mapping[str, Any], config: EvalConfig) -> Task:
    if name not in TASKS:
        raise ValueError(f"tasks has {name!r}, which is unknown; {nearest(name, [*TASKS, 'ruler', 'perplexity'])}")
    known = inspect.signature(TASKS[name]).parameters
    for param in params:
        if param not in known:
            raise ValueError(f"the task {name} has no setting {param!r}; {nearest(param, known)}")
    given = dict(SMALL.get(name, {}) if config.preset == "small" else {})
    try:
        task = TASKS[name](**{**given, **params})
    except TypeError as error:
        raise ValueError(f"the task {name} with {params} cannot be made: {error}") from error
    if config.haystack is not None and task.takes_haystack:
        return replace(task, haystack=Haystack.read(Path(config.haystack)))  # pyright: ignore[reportCallIssue]
    return task


def _ruler_cells(
    params: dict[str, Any], label: str | None, config: EvalConfig, prompts: Prompts, max_length: int
) -> Iterator[RulerCell]:
    if "path" not in params:
        raise ValueError("the task ruler has no path, expected a file in RULER's format or a folder of them")
    path = Path(params.pop("path"))
    task, gen_tokens = params.pop("task", None), params.pop("gen_tokens", None)
    _nothing_left("ruler", params)
    found = (
        [(file.path, file.task, file.length) for file in find_ruler(path)] if path.is_dir() else [(path, task, None)]
    )
    for file, named, length in found:
        named = named or (file.parent.name if file.stem == "validation" else file.stem)
        rows = tuple(read_ruler(file))[: config.examples]
        if not rows:
            raise ValueError(f"{file} is empty, expected an example on every line")
        known = gen_tokens or gen_tokens_of_task(named)
        if length is None:
            longest = max(len(prompts.tokens(example.input, example.answer_prefix)) for example in rows)
            length = min(longest + known, max_length)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        metric = metric_of_task(named)
        yield RulerCell(
            label or named,
            length,
            len(rows),
            prompts,
            path=file,
            sha256=sha256,
            rows=rows,
            gen_tokens=known,
            metric=metric,
            max_length=max_length,
        )


def _nothing_left(task: str, params: Mapping[str, Any]) -> None:
    if params:
        raise ValueError(f"the task {task} has no setting {next(iter(params))!r}")


def digest(identity: Mapping[str, Any]) -> str:
    """The first 12 digits of the SHA-256 of canonical JSON."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
