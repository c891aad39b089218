"""Exact-match retrieval by teacher forcing: an answer counts when every token of it is the model's first choice.

That is greedy decoding's exact match without decoding, so it can run inside training.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from recycled_jax.model import Llama
from recycled_jax.tasks.retrieval import TASKS, make_example


class RetrievalEvaluation:
    """`examples` fresh questions of every task in `tasks`, at `length` tokens."""

    def __init__(self, model: Llama, tokenizer: PreTrainedTokenizerFast, *, length: int, examples: int, seed: int):
        self.length = length
        self._rows = {
            name: [_row(tokenizer, TASKS[name], length, seed, index) for index in range(examples)]
            for name in ("single", "multikey", "chain")
        }
        self._choice = jax.jit(lambda params, tokens: jnp.argmax(cast(jax.Array, model.apply(params, tokens)), axis=-1))

    def __call__(self, params) -> dict[str, float]:
        """Share of examples answered exactly, per task."""
        scores = {}
        for name, rows in self._rows.items():
            right = []
            for tokens, answer in rows:
                choice = np.asarray(self._choice(params, tokens[None]))[0]
                where = np.flatnonzero(answer)
                right.append((choice[where - 1] == tokens[where]).all())
            scores[f"{name}_{self.length}"] = float(np.mean(right))
        return scores


def _row(tokenizer: PreTrainedTokenizerFast, task, length: int, seed: int, index: int):
    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    example = make_example(task, length=length, seed=seed, index=index, encode=encode)
    prompt = encode(example.prompt)
    answer = [*tokenizer(example.gold, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    tokens = np.full(length, tokenizer.pad_token_id, np.int32)
    tokens[: len(prompt) + len(answer)] = prompt + answer
    mask = np.zeros(length, bool)
    mask[len(prompt) : len(prompt) + len(answer)] = True
    return tokens, mask
