"""A batch of questions under one policy: what it answers, what its layers did, and how long that took."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.cells import Cell, Question
from eval.config import Chosen, EvalConfig, up_to_multiple
from eval.metrics import METRICS
from eval.ruler_files import prediction_record
from eval.store import Answer
from recycled_jax.decode import Params
from recycled_jax.extending import repeat_rows
from recycled_jax.frame import LayerTrace, Prefilled
from recycled_jax.generate import Generation, generate, read
from recycled_jax.mesh import rows_together
from recycled_jax.model import Llama
from recycled_jax.scoring import score_tokens
from recycled_jax.telemetry import Telemetry

_NOT_FINITE = "the model gave a probability that is not finite"
BLOCK = 16  # decode steps between two looks at which rows have stopped


def capacity(cell: Cell, questions: Sequence[Question], config: EvalConfig) -> int:
    """Slots for every batch of a cell, so that all run the same programs; more where a prompt is longer than its file
    said."""
    longest = max((len(question.tokens) for question in questions), default=0)
    room = max(cell.new_tokens, max(map(_room, questions), default=0))
    return up_to_multiple(max(cell.length, longest), config.chunk) + up_to_multiple(room, 128)


def of_kept_tokens(telemetry: Telemetry, questions: Sequence[Question]) -> Telemetry:
    """Without the steps that a row made beyond its own limit, because another row's is higher."""
    limits = np.array([question.gen_tokens - 1 for question in questions])
    return replace(telemetry, steps=np.minimum(telemetry.steps, limits))


def read_questions(
    model: Llama,
    params: Params,
    cell: Cell,
    questions: Sequence[Question],
    policies: Sequence[Chosen],
    config: EvalConfig,
) -> Prefilled:
    """The prompts, for policies that read them alike; one that several questions share is read once."""
    rows = [question.tokens for question in _whole_rows(model, questions)]
    apart = list(dict.fromkeys(rows))
    prefilled = read(
        model,
        params,
        _whole_rows(model, apart),
        policies=[chosen.policy for chosen in policies],
        max_new_tokens=max(_room(question) for question in questions),
        capacity=capacity(cell, questions, config),
        chunk=config.chunk,
        cache_dtype=config.cache_dtype,
        implementation=config.implementation,
    )
    if len(apart) < len(rows):
        prefilled = repeat_rows(prefilled, [apart.index(row) for row in rows])
    return jax.block_until_ready(prefilled)


def _room(question: Question) -> int:
    return len(question.fed) + question.gen_tokens + len(question.follows)


def generated(
    model: Llama,
    params: Params,
    prefilled: Prefilled,
    questions: Sequence[Question],
    chosen: Chosen,
    config: EvalConfig,
    *,
    coverage: bool = False,
) -> Generation:
    """Answers to all questions, each as long as the longest may be."""
    fed = [question.fed for question in _whole_rows(model, questions)]
    done = generate(
        model,
        params,
        prefilled,
        policy=chosen.policy,
        max_new_tokens=max(question.gen_tokens for question in questions),
        sampling=config.sampling,
        seed=config.seed + questions[0].line,  # a row draws by its place in the batch
        fed=fed if any(fed) else None,
        coverage=coverage,
        block=BLOCK,
        implementation=config.implementation,
    )
    return replace(done, telemetry=_first_rows(done.telemetry, len(questions)))


def scored(
    model: Llama,
    params: Params,
    prefilled: Prefilled,
    questions: Sequence[Question],
    chosen: Chosen,
    config: EvalConfig,
    *,
    coverage: bool = False,
) -> tuple[np.ndarray, Telemetry]:
    """Negative log-likelihoods (nats) of the tokens that follow, [batch, tokens], and what the steps did."""
    follows = jnp.array([question.follows for question in _whole_rows(model, questions)])
    result = score_tokens(
        model,
        params,
        prefilled,
        follows,
        policy=chosen.policy,
        coverage=coverage,
        implementation=config.implementation,
    )
    trace = {name: np.asarray(values) for name, values in result.trace._asdict().items()}
    steps = np.full(len(follows), follows.shape[1] - 1)
    lengths = np.asarray(prefilled.prompts.lengths)
    telemetry = Telemetry(model.config, chosen.policy, jnp.dtype(model.dtype).itemsize, lengths, steps, **trace)
    nll = -np.asarray(result.log_probs, np.float64)
    return nll[: len(questions)], _first_rows(telemetry, len(questions))


def _whole_rows[Row](model: Llama, rows: Sequence[Row]) -> list[Row]:
    """As many as the devices of a mesh can share evenly: the last one again, whose answers nobody reads."""
    sharing = 1 if model.mesh is None else rows_together(model.mesh)
    return [*rows, *[rows[-1]] * (-len(rows) % sharing)]


def _first_rows(telemetry: Telemetry, count: int) -> Telemetry:
    trace = {name: getattr(telemetry, name)[..., :count] for name in LayerTrace._fields}
    lengths, steps = telemetry.prompt_lengths[:count], telemetry.steps[:count]
    return replace(telemetry, prompt_lengths=lengths, steps=steps, **trace)


def record_of_text(
    cell: Cell, question: Question, done: Generation, row: int, told: Mapping[str, Any], config: EvalConfig
) -> dict[str, Any]:
    """RULER's record of a generated answer, cut at the question's own limit."""
    assert cell.metric is not None
    tokens, stop = done.tokens[row], done.stop[row]
    wrong = {} if np.isfinite(done.log_probs[row]).all() else {"error": _NOT_FINITE, "score": 0.0}
    if len(tokens) > question.gen_tokens:
        tokens, stop = tokens[: question.gen_tokens], "limit"
    text = cell.prompts.decode(tokens)
    scores = METRICS[cell.metric](text, question.outputs, question.meta)
    others = {"stop": stop, "score": scores.pop("score"), **({"extras": scores} if scores else {}), **told, **wrong}
    return _record(cell, question, text, len(tokens), others, config)


def record_of_nll(
    cell: Cell, question: Question, nll: np.ndarray, told: Mapping[str, Any], config: EvalConfig
) -> dict[str, Any]:
    """The same for scored text."""
    if not np.isfinite(nll).all():
        nll, told = np.zeros(0), {**told, "error": _NOT_FINITE}
    rounded = [round(float(value), 6) for value in nll]
    return _record(cell, question, "", len(nll), {"stop": "limit", "nll": rounded, **told}, config)


def failure(cell: Cell, question: Question, told: Mapping[str, Any], config: EvalConfig) -> Answer:
    """A question that could not be asked counts as 0, and as failed."""
    shown = replace(question, outputs=question.outputs or ("(not asked)",))  # RULER's scorer wants a reference
    score = {} if cell.metric is None else {"score": 0.0}
    others = {"stop": "limit", **score, **told, "error": question.error}
    return Answer(_record(cell, shown, "", 0, others, config), None, None)


def _record(
    cell: Cell, question: Question, text: str, gen_tokens: int, others: Mapping[str, Any], config: EvalConfig
) -> dict[str, Any]:
    prompt_tokens = len(question.tokens) + len(question.fed)
    where = {"line": question.line, "task": cell.task, "target_length": cell.length}
    counts = {"prompt_tokens": prompt_tokens, "gen_tokens": gen_tokens}
    digest = {} if config.store_input else {"input_sha256": hashlib.sha256(question.input.encode()).hexdigest()}
    return prediction_record(
        index=question.index,
        pred=text,
        input=question.input if config.store_input else "",
        outputs=question.outputs,
        others={**where, **counts, **others, **digest, "meta": dict(question.meta), "cell": cell.hash},
        length=prompt_tokens + gen_tokens,
    )


def told_by_steps(telemetry: Telemetry, row: int) -> dict[str, Any]:
    """What a prediction says of its decode steps: means over layers and steps."""
    layers, steps = telemetry.config.layers, int(telemetry.steps[row])
    refreshes = int(telemetry.refreshes()[:, row].sum())
    full = int((telemetry.attended[:steps, :, row] >= telemetry.slots()[:steps, None, row]).sum())
    return {
        "policy_steps": round(steps - full / layers, 4),
        "effective_stride": round(steps * layers / refreshes, 4) if refreshes else None,
        "density": _number(telemetry.density()[row]) if steps else None,
        "kv_bytes_per_step": _number(telemetry.kv_bytes_per_token()[row]) if steps else None,
        "dense_kv_bytes_per_step": _number(telemetry.dense_kv_bytes_per_token()[row]) if steps else None,
    }


def layers_of(telemetry: Telemetry, row: int, line: int) -> dict[str, Any]:
    """One line of `telemetry.jsonl`."""
    steps = int(telemetry.steps[row])
    layers = []
    for layer in range(telemetry.config.layers):
        at = (slice(0, steps), layer, row)
        refreshed = np.flatnonzero(telemetry.refreshed[at])
        coverage = telemetry.coverage[at]
        layers.append(
            {
                "layer": layer,
                "refreshes": (refreshed + 1).tolist(),
                "overlap": [_number(value) for value in telemetry.overlap[at][refreshed]],
                "similarity": [_number(value) for value in telemetry.similarity[at] if not np.isnan(value)],
                "coverage_by_age": None if np.isnan(coverage).all() else _by_age(coverage, refreshed),
            }
        )
    return {"line": line, "layers": layers}


def _by_age(coverage: np.ndarray, refreshed: np.ndarray) -> list[float | None]:
    """Means by the steps since the refresh, from 0; the first selection counts as made before step 0."""
    ages, age = np.zeros(len(coverage), int), 0
    for step in range(len(coverage)):
        age = 0 if step in refreshed else age + 1
        ages[step] = age
    return [
        _number(np.nanmean(of_age)) if len(of_age := coverage[(ages == age) & ~np.isnan(coverage)]) else None
        for age in range(ages.max(initial=0) + 1)
    ]


def _number(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 6)
