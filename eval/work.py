"""Answers the batches of a cell, one reading of the prompts for all policies that read them alike."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from tqdm import tqdm

from eval import answer as answering
from eval.cells import Cell, PerplexityCell, Question
from eval.config import Chosen, EvalConfig, couples_rows
from eval.store import Answer, CellFolder, RunFolder
from eval.together import Batches, Wanted, batches
from recycled_jax.decode import Params
from recycled_jax.frame import PrefillAttention, Prefilled
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
            asked = {question.line for question in questions}
            alike = defaultdict(dict)
            for place, lines in wanted.items():
                if lines & asked:
                    alike[self.runs[place].chosen.policy.prefill][place] = lines & asked
            for together in alike.values():
                self._answer_alike(cell, questions, together, progress)

    def _ask(self, cell: Cell, lines: range, wanted: Wanted) -> list[Question]:
        """The questions that can be asked; for those that cannot, the answer is that they failed."""
        questions = []
        for line in lines:
            try:
                question = cell.question(line)
            except Exception as error:
                question = Question(line, line, "", (), (), error=f"{type(error).__name__}: {error}")
            if question.error is None:
                questions.append(question)
                continue
            for run in (self.runs[place] for place, missing in wanted.items() if line in missing):
                run.cell(cell).append([answering.failure(cell, question, self._told(run), self.config)])
        return questions

    def _answer_alike(self, cell: Cell, questions: Sequence[Question], wanted: Wanted, progress: tqdm) -> None:
        """The answers of policies that read prompts alike. Where memory does not do, those of half the questions at a
        time, unless a policy's answers depend on who else is asked."""
        large, error = self._answer_at_once(cell, questions, wanted, progress)
        if not large:
            return
        half = len(questions) // 2
        if half and len(questions) > self.config.batch // 2:
            separable = {p: lines for p, lines in large.items() if not couples_rows(self.runs[p].chosen.policy)}
            for part in (questions[:half], questions[half:]) if separable else ():
                lines = {question.line for question in part}
                of_part = {place: missing & lines for place, missing in separable.items() if missing & lines}
                if of_part:
                    self._answer_alike(cell, part, of_part, progress)
            large = {place: lines for place, lines in large.items() if place not in separable}
        for place in large:
            self.runs[place].cell(cell).fail(error)

    def _answer_at_once(
        self, cell: Cell, questions: Sequence[Question], wanted: Wanted, progress: tqdm
    ) -> tuple[Wanted, Exception]:
        """Those for whom memory did not do, and the error that said so."""
        large: dict[int, set[int]] = {}
        shortage = Exception()
        began = time.perf_counter()
        try:
            prefilled, cold = self._read(cell, questions, self.runs[next(iter(wanted))].chosen.policy.prefill)
        except Exception as error:
            if _out_of_memory(error):
                return wanted, error.with_traceback(None)  # whose frames hold arrays
            for place in wanted:
                self.runs[place].cell(cell).fail(error)
            return {}, error
        seconds = time.perf_counter() - began
        for place, lines in wanted.items():
            run = self.runs[place]
            progress.set_description(f"{cell.task} {cell.length} {run.chosen.title}")
            try:
                answers = self._answers(cell, questions, prefilled, run, seconds, cold)
            except Exception as error:
                if _out_of_memory(error):
                    large[place], shortage = lines, error.with_traceback(None)
                else:
                    run.cell(cell).fail(error)
                continue
            run.cell(cell).append([answer for answer in answers if answer.line in lines])
            progress.update(cell.length * len(lines))
        return large, shortage

    def _read(self, cell: Cell, questions: Sequence[Question], prefill: PrefillAttention) -> tuple[Prefilled, bool]:
        """The prompts, for all runs of the command that read them like that, whether they have answered or not: the
        program must be the same when an interrupted run goes on."""
        policies = [run.chosen for run in self.runs if run.chosen.policy.prefill == prefill]
        prefilled = answering.read_questions(self.model, self.params, cell, questions, policies, self.config)
        chunks = -(-max(len(question.tokens) for question in questions) // self.config.chunk)
        apart = len({question.tokens for question in questions})
        return prefilled, self._first_time(cell, questions, prefill, chunks, apart)

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
            timed = {"prefill": seconds, "decode": time.perf_counter() - began, "steps": int(telemetry.steps.max())}
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
            timed["steps"] = int(telemetry.steps.max())
            telemetry = answering.of_kept_tokens(telemetry, questions)
            records = [
                answering.record_of_text(cell, question, done, row, self._told(run, telemetry, row), self.config)
                for row, question in enumerate(questions)
            ]
        fed = -(-max(len(question.fed) for question in questions) // 16)
        cold |= self._first_time(cell, questions, run.chosen.title, str(run.chosen.knobs), fed)
        timed |= {"line": questions[0].line}
        return [
            Answer(record, answering.layers_of(telemetry, row, question.line), timed if row == 0 and not cold else None)
            for row, (record, question) in enumerate(zip(records, questions, strict=True))
        ]

    def _told(self, run: Run, telemetry: Telemetry | None = None, row: int = 0) -> dict[str, Any]:
        steps = {} if telemetry is None else answering.told_by_steps(telemetry, row)
        return {**steps, "batch": self.config.batch, "config": run.folder.config["hash"]}

    def _first_time(self, cell: Cell, questions: Sequence[Question], *program: Any) -> bool:
        follows = {len(question.follows) for question in questions}
        slots = answering.capacity(cell, questions, self.config)
        key = (type(cell), slots, len(questions), *follows, *program)
        first = key not in self._ran
        self._ran.add(key)
        return first


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
