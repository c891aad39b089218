"""Answers the batches of a cell, one reading of the prompts for all policies that read them alike."""

import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from tqdm import tqdm

from eval import answer as answering
from eval.cells import Cell, PerplexityCell, Question
from eval.config import Chosen, EvalConfig, couples_rows
from eval.store import Answer, CellFolder, RunFolder, write_json
from recycled_jax.decode import Params
from recycled_jax.frame import Prefilled
from recycled_jax.model import Llama
from recycled_jax.telemetry import Telemetry


@dataclass(frozen=True)
class Run:
    """A policy and its folder."""

    chosen: Chosen
    folder: RunFolder

    def cell(self, cell: Cell) -> CellFolder:
        path = self.folder.cell(cell.task, cell.length)
        identity = {**cell.identity, "hash": cell.hash}
        return CellFolder(path, identity, process=jax.process_index(), processes=jax.process_count())


# place of a run → lines of a batch that it has not answered
Wanted = Mapping[int, set[int]]
# number of a batch → the same for each
Batches = Mapping[int, Wanted]


def batches(cell: Cell, size: int) -> Iterator[tuple[int, range]]:
    """The numbers of a cell's batches, and their lines: the same whoever answers them, and however often."""
    for number, first in enumerate(range(0, cell.examples, size)):
        yield number, range(first, min(first + size, cell.examples))


class Work:
    """Answers batches. Remembers which programs have run before, since the first run of one compiles it."""

    def __init__(self, config: EvalConfig, model: Llama, params: Params, runs: Sequence[Run]) -> None:
        self.config, self.model, self.params, self.runs = config, model, params, runs
        self._ran: set[Any] = set()

    def answer(self, cell: Cell, missing: Batches, progress: tqdm) -> None:
        """All that is missing of a cell. What fails is told in the cell's folder, and the rest goes on."""
        lines_of = dict(batches(cell, self.config.batch))
        for number, wanted in missing.items():
            questions = self._ask(cell, lines_of[number], wanted)
            alike = defaultdict(list)
            for place in wanted:
                alike[self.runs[place].chosen.policy.prefill].append(place)
            for places in alike.values():
                self._answer_alike(cell, questions, {place: wanted[place] for place in places}, progress)

    def _ask(self, cell: Cell, lines: range, wanted: Wanted) -> list[Question]:
        """The questions that can be asked; for those that cannot, the answer is that they failed."""
        questions = []
        for line in lines:
            try:
                questions.append(cell.question(line))
            except ValueError as error:
                for run in (self.runs[place] for place, lines in wanted.items() if line in lines):
                    failure = answering.record_of_failure(cell, line, error, self._told(run), self.config)
                    run.cell(cell).append([failure])
        return questions

    def _answer_alike(self, cell: Cell, questions: Sequence[Question], wanted: Wanted, progress: tqdm) -> None:
        """The answers of policies that read prompts alike. Where memory does not do, those of half the questions at a
        time, if no policy's answer depends on who else is asked."""
        if not questions:
            return
        runs = {place: self.runs[place] for place in wanted}
        try:
            began = time.perf_counter()
            policies = [run.chosen for run in runs.values()]
            prefilled = answering.read_questions(self.model, self.params, cell, questions, policies, self.config)
            read = {"seconds": time.perf_counter() - began, "cold": self._first_reading(cell, questions, policies)}
            for place, run in runs.items():
                progress.set_description(f"{cell.task} {cell.length} {run.chosen.title}")
                try:
                    answers = self._answers(cell, questions, prefilled, run, **read)
                except Exception as error:
                    if _out_of_memory(error):
                        raise
                    _tell(run, cell, error)
                    continue
                run.cell(cell).append([answer for answer in answers if answer.line in wanted[place]])
                progress.update(cell.length * len(wanted[place]))
        except Exception as error:
            half = len(questions) // 2
            separable = not any(couples_rows(run.chosen.policy) for run in runs.values())
            if _out_of_memory(error) and half and len(questions) > self.config.batch // 2 and separable:
                for part in (questions[:half], questions[half:]):
                    self._answer_alike(cell, part, self._unanswered(cell, part, wanted), progress)
                return
            for run in runs.values():
                _tell(run, cell, error)

    def _unanswered(self, cell: Cell, questions: Sequence[Question], wanted: Wanted) -> Wanted:
        asked = {question.line for question in questions}
        left = {place: lines & asked - set(self.runs[place].cell(cell).answers()) for place, lines in wanted.items()}
        return {place: lines for place, lines in left.items() if lines}

    def _answers(
        self,
        cell: Cell,
        questions: Sequence[Question],
        prefilled: Prefilled,
        run: Run,
        seconds: float,
        cold: bool,
    ) -> list[Answer]:
        of = (self.model, self.params, prefilled, questions, run.chosen, self.config)
        analysed = questions[0].line < self.config.analysis
        began = time.perf_counter()
        if isinstance(cell, PerplexityCell):
            nll, telemetry = answering.scored(*of)
            timed = {"prefill": seconds, "decode": time.perf_counter() - began}
            if analysed:
                telemetry = answering.scored(*of, coverage=True)[1]
            records = [
                answering.record_of_nll(cell, question, nll[row], self._told(run, telemetry, row), self.config)
                for row, question in enumerate(questions)
            ]
        else:
            done = answering.generated(*of)
            timed = {"prefill": seconds + done.prefill_seconds, "decode": done.decode_seconds}
            telemetry = answering.generated(*of, coverage=True).telemetry if analysed else done.telemetry
            records = [
                answering.record_of_text(cell, question, done, row, self._told(run, telemetry, row), self.config)
                for row, question in enumerate(questions)
            ]
        cold |= self._first_time(cell, len(questions), run.chosen.title, str(run.chosen.knobs))
        timed |= {"line": questions[0].line, "steps": int(telemetry.steps.max())}
        return [
            Answer(record, answering.layers_of(telemetry, row, question.line), timed if row == 0 and not cold else None)
            for row, (record, question) in enumerate(zip(records, questions, strict=True))
        ]

    def _told(self, run: Run, telemetry: Telemetry | None = None, row: int = 0) -> dict[str, Any]:
        steps = {} if telemetry is None else answering.told_by_steps(telemetry, row)
        return {**steps, "batch": self.config.batch, "config": run.folder.config["hash"]}

    def _first_reading(self, cell: Cell, questions: Sequence[Question], policies: Sequence[Chosen]) -> bool:
        observers = frozenset(observer for chosen in policies for observer in chosen.policy.observers)
        chunks = max(len(question.tokens) for question in questions) // self.config.chunk
        return self._first_time(cell, len(questions), policies[0].policy.prefill, observers, chunks)

    def _first_time(self, cell: Cell, rows: int, *program: Any) -> bool:
        key = (type(cell), answering.capacity(cell, self.config), rows, *program)
        first = key not in self._ran
        self._ran.add(key)
        return first


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _tell(run: Run, cell: Cell, error: Exception) -> None:
    path = run.folder.cell(cell.task, cell.length)
    path.mkdir(parents=True, exist_ok=True)
    told = {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}
    write_json(path / "error.json", told)
