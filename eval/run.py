"""The evaluation itself: plan, answer every question under every policy, and put the figures together."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from eval.cells import Cell, digest, make_cells
from eval.config import Chosen, EvalConfig, chosen, couples_rows
from eval.prompts import Prompts, fingerprint
from eval.provenance import invocation
from eval.results import write_results
from eval.store import RunFolder
from eval.together import Batches, left, share, told_by_first, wait
from eval.work import Run, Work
from recycled_jax.commands.loading import Checkpoint
from recycled_jax.mesh import check_decoding, make_mesh, rows_together


def evaluate(config: EvalConfig) -> int:
    """Runs what is missing, and returns the exit status: 0 when every cell is complete, 1 when one has failed.

    Raises ValueError and OSError for bad input, before anything is computed.
    """
    with invocation() as told, ExitStack() as held:
        if config.distributed is not None:
            config.distributed.join()
        checkpoint = Checkpoint.find(config.model)
        prompts = Prompts(checkpoint.text, fingerprint(checkpoint.text), config.template)
        cells = make_cells(config, prompts, config.max_length or checkpoint.config.max_length)
        runs = [Run(one, _folder(config, checkpoint, prompts, one)) for one in chosen(config.policies, config.budgets)]
        dense = _dense(config, checkpoint, prompts, runs)
        for cell in cells:
            for run in runs:
                run.cell(cell)  # refuses one of another task, while nothing has been changed

        def hold_and_read() -> np.ndarray:
            for run in runs:
                held.enter_context(run.folder.held())
            return _answered(cells, runs)

        mesh = None if config.mesh is None else make_mesh(config.mesh, jax.local_devices())
        if mesh is not None:
            check_decoding(checkpoint.config, mesh, batch=rows_together(mesh))
        done = told_by_first(hold_and_read, (len(runs), sum(cell.examples for cell in cells)))
        missing = left(cells, done, config.batch)
        print(_plan(cells, runs, missing, config.examples), file=sys.stderr)
        network, params = checkpoint.load(config.dtype, mesh)
        if any(missing.values()):
            _answer(Work(config, network, params, runs), missing)
        wait("answers")
        complete = True  # the first process says whether it is
        if jax.process_index() == 0:
            weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            complete = write_results(cells, runs, dense, weight_bytes, config.batch)
            entry = {**told(), "processes": jax.process_count(), "batch": config.batch}
            for run in runs:
                run.folder.add_invocation(entry)
            print(f"results in {config.out}; as a table: python -m eval compare {config.out}/*")
        wait("figures")  # a process that ended early would count as dead
    return 0 if complete else 1


def _answer(work: Work, missing: Mapping[Cell, Batches]) -> None:
    """This process's share of it."""
    process = jax.process_index()
    mine = share(missing, work.config.batch, process=process, processes=jax.process_count())
    total = sum(cell.length * len(lines) for cell, of in mine.items() for by in of.values() for lines in by.values())
    with tqdm(total=total, unit="token", unit_scale=True, disable=process > 0) as progress:
        for cell, of_cell in mine.items():
            work.answer(cell, of_cell, progress)


def _answered(cells: Sequence[Cell], runs: Sequence[Run]) -> np.ndarray:
    """1 for each line that a run has answered, and not as one that failed: [runs, lines of all cells]."""

    def of(run: Run, cell: Cell) -> list[bool]:
        answers = run.cell(cell).answers()
        return [line in answers and not answers[line].failed for line in range(cell.examples)]

    return np.array([[known for cell in cells for known in of(run, cell)] for run in runs], np.uint8)


def _dense(config: EvalConfig, checkpoint: Checkpoint, prompts: Prompts, runs: Sequence[Run]) -> Run | None:
    """The run that the others stand beside: that of this command, or what an earlier one with its settings has left."""
    if own := [run for run in runs if run.chosen.name == "full"]:
        return own[0]
    [full] = chosen(["full"], ())
    folder = _folder(dataclasses.replace(config, fresh=False), checkpoint, prompts, full)
    return Run(full, folder) if folder.path.exists() else None


def _folder(config: EvalConfig, checkpoint: Checkpoint, prompts: Prompts, one: Chosen) -> RunFolder:
    model = "embedded" if config.model is None else Path(config.model).name
    settings = {
        "schema": 1,
        "model": {
            "name": model,
            "weights": checkpoint.fingerprint,
            "tokenizer": prompts.fingerprint,
            "dtype": config.dtype,
        },
        "policy": {"name": one.name, **one.knobs},
        "mode": "gather",
        "implementation": config.implementation,
        "template": config.template,
        "sampling": asdict(config.sampling),
        "question": config.question,
        "chunk": config.chunk,
        **({"batch": config.batch} if couples_rows(one.policy) or config.sampling.temperature > 0 else {}),
        **({"seed": config.seed} if config.sampling.temperature > 0 else {}),
        **({} if config.cache_dtype is None else {"cache_dtype": config.cache_dtype}),
        **({} if config.mesh is None else {"mesh": asdict(config.mesh)}),
        # changes no prediction, but what telemetry says beside it; without it, folders of before keep their names
        **({"analysis": config.analysis} if config.analysis else {}),
    }
    return RunFolder(Path(config.out), f"{model}__{one.title}", settings, digest(settings), fresh=config.fresh)


def _plan(cells: Sequence[Cell], runs: Sequence[Run], missing: Mapping[Cell, Batches], wanted: int) -> str:
    examples = sum(cell.examples for cell in cells)
    tokens = sum(cell.examples * cell.length for cell in cells)
    to_answer = sum(len(places) for of in missing.values() for places in of.values())
    short = [f"; {c.task} {c.length} has {c.examples} examples only" for c in cells if c.examples < wanted]
    return (
        f"{len(runs)} policies × {len(cells)} cells: {examples} examples of {tokens:,} tokens for each policy, "
        f"{to_answer} batches to answer{''.join(short)}"
    )
