"""Scores of the model in training: questions answered, and how probable it finds text it was not trained on.

Both are forward passes over whole sequences, so they run on the mesh that trains.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import PreTrainedTokenizerFast

from recycled_jax.model import Llama, SequenceAttention, logits
from recycled_jax.recycled_attention import RecycledAttention
from recycled_jax.tasks.retrieval import TASKS, make_example
from train.config import Evaluation
from train.step import spread

Score = Callable[[Any], Mapping[str, float]]  # of parameters


def evaluations(
    model: Llama,
    tokenizer: PreTrainedTokenizerFast,
    mesh: Mesh,
    config: Evaluation,
    *,
    seed: int,
    recycled: RecycledAttention | None = None,
) -> Sequence[Score]:
    """What `config` asks for; `recycled` is what the model was trained with, if with that. Raises ValueError where the
    texts or the length are too short."""
    asked: list[Score] = []
    if config.retrieval:
        asked.append(retrieval(model, tokenizer, mesh, config, seed=seed))
    if config.texts:
        asked.append(perplexity(model, tokenizer, mesh, config, recycled or RecycledAttention()))
    return asked


def retrieval(model: Llama, tokenizer: PreTrainedTokenizerFast, mesh: Mesh, config: Evaluation, *, seed: int) -> Score:
    """Share of fresh questions answered exactly, per task, by teacher forcing: every token of an answer is the model's
    first choice, which is greedy decoding's exact match without decoding."""
    tasks = {name: _questions(tokenizer, name, config, seed) for name in ("single", "multikey", "chain")}
    model = model.clone(mesh=mesh)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def right(params, tokens, answer):
        choice = jnp.argmax(cast(jax.Array, model.apply(params, tokens)), axis=-1)
        return jnp.all((choice[:, :-1] == tokens[:, 1:]) | ~answer[:, 1:], axis=1)

    def score(params) -> dict[str, float]:
        of_rows = functools.partial(right, params)
        return {
            f"{name}_{config.length}": float(np.mean(_by_batch(of_rows, rows, mesh))) for name, rows in tasks.items()
        }

    return score


def perplexity(
    model: Llama, tokenizer: PreTrainedTokenizerFast, mesh: Mesh, config: Evaluation, recycled: RecycledAttention
) -> Score:
    """Perplexity of the last tokens of pieces of text, in full attention and as recycled decoding at each stride would
    find it, selecting as `recycled` does: with evicting selections and full refreshes, training's attention gives
    decoding's logits (`recycled_jax.recycled_attention`)."""
    pieces = _pieces(tokenizer, config)
    k = config.length // 8 if config.k is None else config.k
    attentions: dict[str, SequenceAttention] = {"full": model.attention}
    for stride in config.strides:
        chunks = config.scored // stride
        attentions[f"stride_{stride}"] = replace(recycled, k=k, stride=stride, chunks=chunks, anchor="full", evict=True)

    def of_tokens(weights, config_, x):
        return logits(weights, config_, x[:, -config.scored - 1 : -1])

    def make(attention: SequenceAttention):
        attending = model.clone(mesh=mesh, attention=attention)

        @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
        def nll(params, tokens):
            found = jax.nn.log_softmax(cast(jax.Array, attending.apply(params, tokens, head=of_tokens)))
            return -jnp.take_along_axis(found, tokens[:, -config.scored :, None], axis=-1)[..., 0].mean(axis=1)

        return nll

    programs = {name: make(attention) for name, attention in attentions.items()}

    def score(params) -> dict[str, float]:
        return {
            f"perplexity_{name}": float(np.exp(np.mean(_by_batch(functools.partial(nll, params), [pieces], mesh))))
            for name, nll in programs.items()
        }

    return score


def _by_batch(of_rows: Callable, arrays: Sequence[np.ndarray], mesh: Mesh) -> np.ndarray:
    """A figure of every row, as many rows at a time as share the mesh; the last ones are filled up with the first."""
    rows, at_once = len(arrays[0]), mesh.shape["data"] * mesh.shape["fsdp"]
    found = []
    for first in range(0, rows, at_once):
        taken = np.arange(first, first + at_once) % rows
        found.append(np.asarray(of_rows(*(spread(array[taken], mesh) for array in arrays))))
    return np.concatenate(found)[:rows]


def _pieces(tokenizer: PreTrainedTokenizerFast, config: Evaluation) -> np.ndarray:
    """Pieces of the texts, evenly spaced over all of them, int32 [examples, length]."""
    texts = [Path(path).read_text(encoding="utf-8") for path in config.texts]
    tokens = np.concatenate([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
    begin = tokenizer("")["input_ids"]  # what the tokenizer puts before a text, if anything
    length = config.length - len(begin)
    if len(tokens) < length:
        raise ValueError(
            f"evaluation.texts have {len(begin) + len(tokens)} tokens; expected at least length={config.length}"
        )
    starts = np.linspace(0, len(tokens) - length, config.examples).astype(int)
    return np.stack([[*begin, *tokens[start : start + length]] for start in starts]).astype(np.int32)


def _questions(tokenizer: PreTrainedTokenizerFast, task: str, config: Evaluation, seed: int) -> list[np.ndarray]:
    """Tokens, and which of them are the answers', both [examples, length]."""
    rows = [_question(tokenizer, TASKS[task], config.length, seed, index) for index in range(config.examples)]
    return [np.stack(of_rows) for of_rows in zip(*rows, strict=True)]


def _question(
    tokenizer: PreTrainedTokenizerFast, task, length: int, seed: int, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """A prompt with its answer, filled up to `length`, and which tokens are the answer's."""

    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    example = make_example(task, length=length, seed=seed, index=index, encode=encode)
    prompt = encode(example.prompt)
    answer = [*tokenizer(example.gold, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    tokens = np.full(length, tokenizer.eos_token_id, np.int32)
    tokens[: len(prompt) + len(answer)] = prompt + answer
    mask = np.zeros(length, bool)
    mask[len(prompt) : len(prompt) + len(answer)] = True
    return tokens, mask
