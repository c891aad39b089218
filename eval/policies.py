"""Every policy on the same questions: `python -m eval.policies --out docs/policies_quality.jsonl --book NOVEL.txt`.

Retrieval from long generated prose (one needle, one of eight, a chain of keys), the perplexity of the last 256 tokens
of pieces of a novel, and the attention mass of the selections there, for budgets that are shares of the context. All
policies go on from the same prefill, and decode the same examples. One line of JSON per policy and batch of examples,
after a line that says where they come from: a run that was interrupted goes on where it stopped, and one of another
configuration is refused. `--table` prints the results as Markdown: means, and perplexities by distance from the prompt.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jsonargparse import auto_cli
from tqdm import tqdm

from eval.provenance import provenance
from recycled_jax.commands.loading import Checkpoint
from recycled_jax.decode import Params
from recycled_jax.frame import Prefilled
from recycled_jax.generate import generate, read
from recycled_jax.model import Llama
from recycled_jax.policies import Policy, make_policy
from recycled_jax.policies.attention_predictor import SHIPPED
from recycled_jax.scoring import score_tokens
from recycled_jax.tasks.example import Example
from recycled_jax.tasks.retrieval import TASKS, make_example, score

# As published, but for what a model of four layers and budgets of a few hundred slots ask for: windows that are shares
# of the budget, and one dense layer below one that selects. It is layer 1 that finds what the text asks for; where it
# follows a selection of layer 0 instead, which looks at neighbours, nothing is found.
_LAYERS = {"dense_layers": (0,), "selection_layers": (1,)}
CANDIDATES: dict[str, Callable[[int], Policy]] = {
    "full": lambda k: make_policy("full"),
    "top-k": lambda k: make_policy("top-k", k=k),
    "top-p": lambda k: make_policy("top-p", k=k, p=0.9),
    "recycled": lambda k: make_policy("recycled", k=k, stride=8),
    "recycled, stride 2": lambda k: make_policy("recycled", k=k, stride=2),
    "recycled, score-only": lambda k: make_policy("recycled", k=k, stride=8, refresh="selection"),
    "recycled, int8 scores": lambda k: _cheaper_refresh({"name": "int8"}, k),
    "recycled, page bounds": lambda k: _cheaper_refresh({"name": "page-bounds", "page": 16}, k),
    "recycled-v1": lambda k: make_policy("recycled-v1", k=k, stride=8),
    "stale-top-k": lambda k: make_policy("stale-top-k", k=k, delay=8, pool=7),
    "recycled-dynamic": lambda k: make_policy("recycled-dynamic", k=k, stride=4, threshold=0.95),
    "tidal": lambda k: make_policy("tidal", k=k, **_LAYERS),
    "recycled-tidal": lambda k: make_policy("recycled-tidal", k=k, stride=8, pool=7, **_LAYERS),
    "less-is-more": lambda k: make_policy("less-is-more", k=k, **_LAYERS),
    "long-heads": lambda k: make_policy("long-heads", k=k, chunk=min(k // 8, 256)),
    "snapkv": lambda k: make_policy("snapkv", k=k, window=min(32, k // 4), tail=0),
    "snapkv, window 1": lambda k: make_policy("snapkv", k=k, window=1, pool=7, pooling="max", tail=0),
    "h2o": lambda k: make_policy("h2o", k=k),
    "tova": lambda k: make_policy("tova", k=k),
    "streaming": lambda k: make_policy("streaming", k=k),
    "quest": lambda k: make_policy("quest", k=k, dense_layers=()),
    "double-sparse": lambda k: make_policy("double-sparse", k=k, dense_layers=()),
    "token-select": lambda k: make_policy("token-select", k=k, sinks=k // 32, recent=k // 8, max_stride=8),
    "tactic": lambda k: make_policy("tactic", k=k),
    "squeezed": lambda k: make_policy("squeezed", k=k, window=k // 4, iterations=10),
    "infllm": lambda k: make_policy("infllm", k=k, block=16, sinks=k // 32, recent=k // 4),
    "act-qkv": lambda k: make_policy("act-qkv", k=k, block=16, sinks=k // 32, recent=k // 4),
    "attention-predictor": lambda k: make_policy("attention-predictor", k=k, sinks=k // 16, recent=k // 16),
    "attention-predictor, network": lambda k: make_policy(
        "attention-predictor", k=k, sinks=k // 16, recent=k // 16, predictor="cnn"
    ),
    "random": lambda k: make_policy("random", k=k, sinks=4),
}
SCORED = 256  # tokens of a piece of the novel whose probability counts; those before are its prompt
STRETCH = 32  # tokens over which the figures of a piece are kept apart: later ones lie further from the prompt
Task = Literal["single", "multikey", "chain", "novel", "mass"]
OF_THE_NOVEL = ("novel", "mass")


def _cheaper_refresh(scorer: dict[str, Any], k: int) -> Policy:
    """Score-only refreshes by another scorer."""
    selector, schedule = {"name": "top-k", "k": k, "pool": 7}, {"name": "fixed", "stride": 8}
    return make_policy("composed", scorer=scorer, selector=selector, schedule=schedule)


@dataclass(frozen=True)
class Question:
    """Tokens of a prompt, and either the example that it asks or the text that follows."""

    prompt: list[int]
    example: Example | None = None
    follows: tuple[int, ...] = ()


def evaluate(
    out: Path,
    book: Path,
    length: int = 4096,
    budgets: list[int] = [128, 256, 512],  # noqa: B006  (a default for the command line, never changed)
    tasks: list[Task] = ["single", "multikey", "chain", "novel", "mass"],  # noqa: B006
    policies: list[str] = list(CANDIDATES),  # noqa: B006
    examples: int = 100,
    seed: int = 2026,
    batch: int = 10,
    model: str | None = None,
    table: bool = False,
) -> None:
    """Args as in the module's text; `model` is the embedded one when not given."""
    if table:
        print(tables(_results(out)))
        return
    unknown = [name for name in policies if name not in CANDIDATES]
    if unknown:
        raise ValueError(f"policies has {unknown[0]!r}; expected some of {', '.join(CANDIDATES)}")
    checkpoint = Checkpoint.find(model)
    network, params = checkpoint.load("float32")
    encode = checkpoint.text.encode
    config = {"length": length, "examples": examples, "batch": batch, "seed": seed}
    done = _resume(out, config | {"model": model or "embedded", "book": book.name})
    runs = [(name, k) for name in policies for k in (budgets if name != "full" else [length])]
    novel = encode(book.read_text(encoding="utf-8")) if set(OF_THE_NOVEL) & set(tasks) else []
    with tqdm(total=len(tasks) * examples * len(runs), unit="example") as progress, out.open("a") as file:
        for task in tasks:
            for first in range(0, examples, batch):
                indices = range(first, min(first + batch, examples))
                missing = [(name, k) for name, k in runs if (task, name, k, first, _digest(name, k)) not in done]
                if task == "mass":
                    missing = [(name, k) for name, k in missing if name != "full"]  # it selects nothing
                progress.update(len(indices) * (len(runs) - len(missing)))
                if not missing:
                    continue
                questions = [_question(task, i, length, seed, examples, encode, novel) for i in indices]
                for name, k, figures in _answer(
                    network, params, questions, missing, length, progress, checkpoint, task
                ):
                    line = {"task": task, "policy": name, "k": k, "first": first, "knobs": _digest(name, k), **figures}
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    progress.update(len(indices))
    print(tables(_results(out)))


def _results(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()[1:]]


def _resume(out: Path, config: dict[str, Any]) -> set[tuple[str, str, int, int, str]]:
    """What stands in the file already; begins a new one if there is none."""
    if not out.exists() or not out.read_text():
        out.write_text(json.dumps({**provenance(), "config": config}) + "\n")
        return set()
    whole = out.read_text()
    lines = whole.splitlines()
    if not whole.endswith("\n"):  # the last line was cut short
        lines = lines[:-1]
        out.write_text("".join(f"{line}\n" for line in lines))
    found = json.loads(lines[0])["config"]
    if found != config:
        raise ValueError(f"out={str(out)!r} holds results of {found}; expected {config}")
    return {(line["task"], line["policy"], line["k"], line["first"], line["knobs"]) for line in _results(out)}


def _digest(name: str, k: int) -> str:
    """Of the candidate with all its knobs: results of another one under the same name are not taken for its own."""
    told = repr(CANDIDATES[name](k)).replace(str(SHIPPED.parent), "")  # wherever the package lies
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def _question(
    task: Task, index: int, length: int, seed: int, count: int, encode: Callable, novel: Sequence[int]
) -> Question:
    if task not in OF_THE_NOVEL:
        example = make_example(TASKS[task], length=length, seed=seed, index=index, encode=encode)
        return Question(encode(example.prompt), example)
    if len(novel) < length + count:
        raise ValueError(f"book has {len(novel)} tokens; expected more than {length + count}")
    start = (len(novel) - length) * index // count
    piece = list(novel[start : start + length])
    return Question(piece[:-SCORED], follows=tuple(piece[-SCORED:]))


def _answer(
    network: Llama,
    params: Params,
    questions: list[Question],
    runs: list[tuple[str, int]],
    length: int,
    progress: tqdm,
    checkpoint: Checkpoint,
    task: str,
) -> Iterator[tuple[str, int, dict[str, list]]]:
    """For each run its figures, one for each question. Policies that read prompts alike share the reading."""
    by_prefill = defaultdict(list)
    for name, k in runs:
        policy = CANDIDATES[name](k)
        by_prefill[policy.prefill].append((policy, name, k))
    new_tokens = SCORED if task in OF_THE_NOVEL else max(q.example.gen_tokens for q in questions if q.example)
    for alike in by_prefill.values():
        prefilled = read(
            network,
            params,
            [question.prompt for question in questions],
            policies=[policy for policy, _, _ in alike],
            max_new_tokens=new_tokens,
            capacity=length + 128,
        )
        for policy, name, k in alike:
            progress.set_description(f"{task} {name} {k}")
            if task == "novel":
                yield name, k, _log_probs(network, params, prefilled, questions, policy)
            elif task == "mass":
                yield name, k, _mass(network, params, prefilled, questions, policy)
            else:
                yield name, k, _scores(network, params, prefilled, questions, policy, new_tokens, checkpoint)


def _scores(
    network: Llama,
    params: Params,
    prefilled: Prefilled,
    questions: list[Question],
    policy: Policy,
    new_tokens: int,
    checkpoint: Checkpoint,
) -> dict[str, list]:
    """Scores of the answers, the share of the dense policy's bytes that they read, and their lengths."""
    done = generate(network, params, prefilled, policy=policy, max_new_tokens=new_tokens, block=16)
    right = []
    for question, tokens in zip(questions, done.tokens, strict=True):
        assert question.example is not None
        right.append(score(question.example, checkpoint.text.decode(tokens)))
    with np.errstate(invalid="ignore"):  # of an answer of one token, which no step decoded
        share = done.telemetry.kv_bytes_per_token() / done.telemetry.dense_kv_bytes_per_token()
    return {"score": right, "read": _rounded(share), "tokens": [len(tokens) for tokens in done.tokens]}


def _log_probs(
    network: Llama, params: Params, prefilled: Prefilled, questions: list[Question], policy: Policy
) -> dict[str, list]:
    """Mean negative log-likelihoods, of all tokens and of each `STRETCH` of them, and what the steps read."""
    follows = jnp.array([question.follows for question in questions])
    scored = score_tokens(network, params, prefilled, follows, policy=policy)
    slots = 2 * np.asarray(scored.trace.attended) + np.asarray(scored.trace.scored)  # [steps, layers, batch]
    lengths = np.asarray(prefilled.prompts.lengths)[None, None, :] + 1 + np.arange(len(slots))[:, None, None]
    share = slots.mean(axis=(0, 1)) / (2 * lengths).mean(axis=(0, 1))
    nll = -np.asarray(scored.log_probs, np.float64).reshape(len(questions), -1, STRETCH).mean(axis=2)
    by_stretch = [_rounded(of_row) for of_row in nll]
    return {"nll": _rounded(nll.mean(axis=1)), "nll_by_stretch": by_stretch, "read": _rounded(share)}


def _mass(
    network: Llama, params: Params, prefilled: Prefilled, questions: list[Question], policy: Policy
) -> dict[str, list]:
    """Mean attention mass on the selections, over the steps and the layers that make one or take one over; a step that
    attends everything counts by its selection. Measuring it reads all keys."""
    follows = jnp.array([question.follows for question in questions])
    scored = score_tokens(network, params, prefilled, follows, policy=policy, coverage=True)
    by_layer = np.asarray(scored.trace.coverage).mean(axis=0)
    selecting = ~np.isnan(by_layer).any(axis=1)
    return {"mass": _rounded(by_layer[selecting].mean(axis=0))}


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def tables(results: Sequence[dict]) -> str:
    """All that the results tell."""
    return f"{markdown(results)}\n\n{by_distance(results)}"


def by_distance(results: Sequence[dict]) -> str:
    """How the perplexity of a novel's piece, over the dense policy's, goes with the distance from the prompt."""
    log_probs: dict[tuple[str, int], dict[int, list]] = defaultdict(dict)
    for line in results:
        if line["task"] == "novel":
            log_probs[line["policy"], line["k"]][line["first"]] = line["nll_by_stretch"]
    dense = next((batches for (name, _), batches in log_probs.items() if name == "full"), {})
    ends = range(STRETCH, SCORED + 1, STRETCH)
    lines = [f"| policy | k | {' | '.join(f'to {end}' for end in ends)} |", "|---" * (len(ends) + 2) + "|"]
    for name, k in _in_order(log_probs):
        both = [first for first in log_probs[name, k] if first in dense]
        if name != "full" and both:
            ours, full = (np.concatenate([part[first] for first in both]) for part in (log_probs[name, k], dense))
            ratios = np.exp(ours.mean(axis=0) - full.mean(axis=0))
            lines.append(f"| {name} | {k} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |")
    return "\n".join(lines)


def _in_order(cells: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Policies and budgets, as the candidates stand."""
    order = {name: place for place, name in enumerate(CANDIDATES)}
    return sorted(cells, key=lambda cell: (order.get(cell[0], len(order)), cell[1]))


def markdown(results: Sequence[dict]) -> str:
    """Policies with their budgets as lines, tasks as columns, each with the fewest examples of a line that has any:
    percent right or perplexity, then means over the tasks that tell them: the attention mass of the selections, and the
    share of the dense policy's bytes."""
    cells: dict[tuple[str, int], dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for line in results:
        cell = cells[line["policy"], line["k"]]
        if line["task"] != "mass":
            cell[line["task"]] += line["score"] if "score" in line else line["nll"]
        for figure in ("mass", "read"):
            cell[figure] += [value for value in line.get(figure, []) if value is not None]
    tasks = list(dict.fromkeys(line["task"] for line in results if line["task"] != "mass"))
    titles = ["perplexity" if task == "novel" else task for task in tasks]
    counts = [min(len(cell[task]) for cell in cells.values() if cell[task]) for task in tasks]
    titles = [f"{title} ({count})" for title, count in zip(titles, counts, strict=True)]
    lines = [f"| policy | k | {' | '.join(titles)} | mass of selection | bytes read |", "|---" * (len(tasks) + 4) + "|"]
    for name, k in _in_order(cells):
        cell = cells[name, k]
        means = {of: 100 * np.mean(values) for of, values in cell.items() if values}
        told = [f"{means[task]:.0f}" if task in means else "" for task in tasks]
        if cell["novel"]:
            told[tasks.index("novel")] = f"{math.exp(np.mean(cell['novel'])):.1f}"
        told += [f"{means[figure]:.0f} %" if figure in means else "" for figure in ("mass", "read")]
        lines.append(f"| {name} | {k} | {' | '.join(told)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    auto_cli(evaluate, as_positional=False)
