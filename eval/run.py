"""The evaluation itself: plan, answer every question under every policy, and put the figures together."""

import datetime
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from eval.cells import Cell, digest, make_cells
from eval.config import Chosen, EvalConfig, chosen, couples_rows
from eval.prompts import Prompts, fingerprint
from eval.provenance import provenance
from eval.ruler_files import summary_csv
from eval.store import RunFolder, write_json
from eval.summary import beside_dense, cell_metrics, long_csv, task_scores, timing
from eval.work import Batches, Run, Work, batches
from recycled_jax.commands.loading import Checkpoint


def evaluate(config: EvalConfig) -> int:
    """Runs what is missing, and returns the exit status: 0 when every cell is complete, 1 when one has failed.

    Raises ValueError and OSError for bad input, before anything is computed or changed.
    """
    if config.distributed is not None:
        config.distributed.join()
    checkpoint = Checkpoint.find(config.model)
    prompts = Prompts(checkpoint.text, fingerprint(checkpoint.text), config.template)
    cells = make_cells(config, prompts, config.max_length or checkpoint.config.max_length)
    runs = [Run(one, _folder(config, checkpoint, prompts, one)) for one in chosen(config.policies, config.budgets)]
    missing = {cell: _missing(cell, runs, config) for cell in cells}
    print(_plan(cells, runs, missing, config.examples), file=sys.stderr)
    for run in runs if jax.process_index() == 0 else ():
        run.folder.begin()
    started = _now()
    network, params = checkpoint.load(config.dtype)
    if any(missing.values()):
        work = Work(config, network, params, runs)
        total = sum(
            cell.length * len(lines) for cell, of in missing.items() for by in of.values() for lines in by.values()
        )
        with tqdm(total=total, unit="token", unit_scale=True, disable=jax.process_index() > 0) as progress:
            for cell, of_cell in missing.items():
                work.answer(cell, of_cell, progress)
    _wait("answers")
    complete = True  # the first process says whether it is
    if jax.process_index() == 0:
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        complete = _summarize(cells, runs, weight_bytes, config)
        for run in runs:
            told = {"started": started, "ended": _now(), "processes": jax.process_count(), "batch": config.batch}
            run.folder.add_invocation({**provenance(), **told})
    _wait("figures")  # a process that ended early would count as dead
    return 0 if complete else 1


def _missing(cell: Cell, runs: Sequence[Run], config: EvalConfig) -> Batches:
    """Of the batches that are this process's. A batch is answered whole, for its rows may differ in their last bits
    when others stand beside them; so they are what is dealt out."""
    missing: dict[int, dict[int, set[int]]] = defaultdict(dict)
    for place, run in enumerate(runs):
        done = {line for line, answer in run.cell(cell).answers().items() if not answer.failed}
        for number, lines in batches(cell, config.batch):
            if number % jax.process_count() == jax.process_index() and not done.issuperset(lines):
                missing[number][place] = set(lines) - done
    return dict(sorted(missing.items()))


def _summarize(cells: Sequence[Cell], runs: Sequence[Run], weight_bytes: int, config: EvalConfig) -> bool:
    """Writes every run's files, and says whether all is there."""
    dense = next((run for run in runs if run.chosen.name == "full"), None)
    complete = True
    for cell in cells:
        theirs = [] if dense is None else list(dense.cell(cell).answers().values())
        for run in runs:
            folder = run.cell(cell)
            own = list(folder.answers().values())
            missing, failed = cell.examples - len(own), sum(answer.failed for answer in own)
            if missing or failed:
                complete = False
                why = folder.path / ("error.json" if missing else "predictions.jsonl")
                counts = f"lacks {missing} of {cell.examples} answers, {failed} failed"
                print(f"eval: {folder.path} {counts}; see {why}", file=sys.stderr)
            if missing:
                continue
            folder.merge()
            metrics = cell_metrics(cell, own, weight_bytes)
            metrics["dense"] = beside_dense(dense.folder.path.name, own, theirs) if dense is not None else None
            write_json(folder.path / "metrics.json", metrics)
            write_json(folder.path / "timing.json", timing([a.seconds for a in own if a.seconds], config.batch))
    for run in runs:
        _write_run(run)
    return complete


def _write_run(run: Run) -> None:
    """The figures of all its cells, those of earlier invocations too."""
    config, path = run.folder.config, run.folder.path
    policy, model = config["policy"], config["model"]["name"]
    figures = [json.loads(found.read_text()) for found in sorted(path.glob("cells/*/*/metrics.json"))]
    figures.sort(key=lambda cell: (cell["task"], cell["length"]))
    write_json(path / "metrics.json", {"hash": config["hash"], "policy": policy, "model": model, "cells": figures})
    for length, columns in task_scores(figures).items():
        (path / f"summary-{length}.csv").write_text(summary_csv(columns))
    (path / "summary_long.csv").write_text(long_csv(model, policy, figures))


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
    }
    return RunFolder(Path(config.out), f"{model}__{one.title}", settings, digest(settings), fresh=config.fresh)


def _plan(cells: Sequence[Cell], runs: Sequence[Run], missing: dict[Cell, Batches], wanted: int) -> str:
    examples = sum(cell.examples for cell in cells)
    tokens = sum(cell.examples * cell.length for cell in cells)
    left = sum(len(places) for of in missing.values() for places in of.values())
    short = [f"; {c.task} {c.length} has {c.examples} examples only" for c in cells if c.examples < wanted]
    return (
        f"{len(runs)} policies × {len(cells)} cells: {examples} examples of {tokens:,} tokens for each policy, "
        f"{left} batches to answer{''.join(short)}"
    )


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
