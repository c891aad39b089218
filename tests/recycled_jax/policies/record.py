"""Runs a policy and notes the slots that every layer attended at every step, in the form that the numpy oracles do."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recycled_jax.config import LlamaConfig
from recycled_jax.decode import begin, decode_step
from recycled_jax.frame import Method
from recycled_jax.generate import Generation, generate, read
from recycled_jax.policies import Policy
from recycled_jax.state import DecodeState
from tests.recycled_jax.policies.numpy_llama import Full, NumpyLlama
from tests.recycled_jax.random_model import CONFIG, tiny_model

# query heads per kv head: 1 and 4
ONE_TO_ONE, ALL_SHARE = (dataclasses.replace(CONFIG, kv_heads=kv_heads) for kv_heads in (4, 1))
# of one row: by layer, one entry per step, the slots of every kv head in order; dense layers have none
Selections = dict[int, list[list[list[int]]]]

# by layer, one array of positions per step; a module's own, so that runs of equal policies share a compiled program
_NOTED: dict[int, list[np.ndarray]] = defaultdict(list)


def run(
    policy: Policy, rows: Sequence[Sequence[int]], new_tokens: int, config: LlamaConfig = CONFIG, **options: Any
) -> tuple[Generation, list[Selections]]:
    """What the policy generates, and the selections of each row."""
    _NOTED.clear()
    model, params = tiny_model(config)
    options = {"chunk": 16, "block": 8, **options}
    generation = generate(model, params, rows, policy=_noting(policy), max_new_tokens=new_tokens, **options)
    return generation, _selections(len(rows))


def run_on(
    policy: Policy, rows: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], config: LlamaConfig = CONFIG
) -> tuple[DecodeState, list[Selections]]:
    """The same for given tokens instead of generated ones: the state after them, and the selections."""
    _NOTED.clear()
    model, params = tiny_model(config)
    prefilled = read(model, params, rows, policies=[policy], max_new_tokens=len(tokens[0]), chunk=16)
    state = _begin(_noting(policy), prefilled)
    for column in zip(*tokens, strict=True):
        state = _step(model, params, state, jnp.array(column, jnp.int32), policy=_noting(policy))
    return state, _selections(len(rows))


_begin = jax.jit(begin, static_argnums=0)


@functools.partial(jax.jit, static_argnames=("model", "policy"))
def _step(model, params, state, token, *, policy):
    return decode_step(model, params, state, token, policy=policy)[1]


@functools.cache
def _dense_tokens(row: tuple[int, ...], new_tokens: int, config: LlamaConfig) -> list[int]:
    return NumpyLlama(config, tiny_model(config)[1], Full()).generate(row, new_tokens)


def dense_tokens(rows: Sequence[Sequence[int]], new_tokens: int, config: LlamaConfig = CONFIG) -> list[list[int]]:
    """What full attention generates, in plain numpy."""
    return [_dense_tokens(tuple(row), new_tokens, config) for row in rows]


def assert_equals_oracle(
    policy: Policy,
    oracle: Callable[[], Any],
    rows: Sequence[Sequence[int]],
    new_tokens: int,
    config: LlamaConfig = CONFIG,
) -> None:
    """The tokens of a ragged batch and all selections are those of the oracle, made anew for each row by itself."""
    generation, selections = run(policy, rows, new_tokens, config)
    _, params = tiny_model(config)
    for row, prompt in enumerate(rows):
        numpy_policy = oracle()
        tokens = NumpyLlama(config, params, numpy_policy).generate(prompt, new_tokens)
        assert selections[row] == dict(numpy_policy.selected)
        assert generation.tokens[row] == tokens


def assert_rows_alone(
    policy: Policy, rows: Sequence[Sequence[int]], new_tokens: int, which: Sequence[int], config: LlamaConfig
) -> None:
    """Each row of `which` gives in the batch what it gives by itself."""
    together, _ = run(policy, rows, new_tokens, config)
    for row in which:
        alone, _ = run(policy, [rows[row]], new_tokens, config)
        assert alone.tokens == [together.tokens[row]]


@dataclass(frozen=True)
class Noting(Method):
    """A method that tells what it attends."""

    method: Method

    @property
    def axes(self):
        return self.method.axes

    @property
    def observers(self):
        return self.method.observers

    @property
    def keeps_cache(self):
        return self.method.keeps_cache

    @property
    def plan(self):
        return self.method.plan

    def runs(self, layers):
        return self.method.runs(layers)

    def begin(self, prefilled, *, implementation):
        return self.method.begin(prefilled, implementation=implementation)

    def corrected(self, state, cache, *, implementation):
        return self.method.corrected(state, cache, implementation=implementation)

    def before_layers(self, state, cache):
        return self.method.before_layers(state, cache)

    def attend(self, role, token, cache, state, handed, here):
        attended = self.method.attend(role, token, cache, state, handed, here)
        if attended.positions is not None:
            jax.debug.callback(_note, here.layer, attended.positions, ordered=True)
        return attended


def _noting(policy: Policy) -> Policy:
    return dataclasses.replace(policy, method=Noting(policy.method))


def _note(layer, positions) -> None:
    _NOTED[int(layer)].append(np.array(positions))


def _selections(rows: int) -> list[Selections]:
    jax.effects_barrier()
    return [{layer: [_slots(step[row]) for step in steps] for layer, steps in _NOTED.items()} for row in range(rows)]


def _slots(positions: np.ndarray) -> list[list[int]]:
    return [sorted(int(slot) for slot in head if slot >= 0) for head in positions]
