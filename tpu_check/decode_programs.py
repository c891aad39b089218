"""Whole decode programs of `recycled_jax`: one step of each kind, and a nested block of a stride's steps."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from recycled_jax.config import LlamaConfig
from recycled_jax.decode import begin, decode_step
from recycled_jax.frame import LastQueries, Prefilled, PromptRecord, StepKind
from recycled_jax.frame.prompt import QueryWindow
from recycled_jax.generate import LoopState, run_block
from recycled_jax.model import Llama
from recycled_jax.planning.chips import Chip
from recycled_jax.planning.sizes import nbytes, params_of
from recycled_jax.policies import Policy, make_policy
from recycled_jax.sampling import Sampling
from recycled_jax.state import DecodeState, model_cache
from tpu_check.programs import BUDGET, DTYPE, TOKENS, Built, LimitName, Program, array

STRIDE = 10
_LIMITS: dict[LimitName, float] = {"copies": 0, "temporaries": 0.02, "unaliased": 0.0}


def decode_programs() -> Iterator[Program]:
    for model in ("8B", "1B"):
        for batch in (1, 8):
            kinds: dict[str, Callable[[Chip, LlamaConfig, int], Built]] = {
                "dense step": _dense_step,
                "full step": functools.partial(_step, kind="refresh"),
                "recycled step": functools.partial(_step, kind="recycled"),
                "cond step": functools.partial(_step, kind="scheduled"),
                "nested loop": _nested_loop,
            }
            for what, build in kinds.items():
                short = (model, batch, what) == ("1B", 1, "cond step")
                yield Program("decode", model, batch, what, build, _LIMITS, short=short)


def _dense_step(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    fitting, params, state = _fit(chip, config, batch, make_policy("full"))
    return _build_step(fitting, params, state, batch, make_policy("full"), "scheduled", nbytes(state.cache))


def _step(chip: Chip, config: LlamaConfig, batch: int, *, kind: StepKind) -> Built:
    policy = make_policy("recycled", k=BUDGET, stride=STRIDE)
    fitting, params, state = _fit(chip, config, batch, policy)
    moved = _recycled_bytes(state) if kind == "recycled" else _refresh_bytes(state)
    return _build_step(fitting, params, state, batch, policy, kind, moved)


def _build_step(
    config: LlamaConfig, params: Any, state: DecodeState, batch: int, policy: Policy, kind: StepKind, moved: int
) -> Built:
    model = Llama(config, dtype=DTYPE, param_dtype=DTYPE)

    def step(params, state, token):
        logits, state, _ = decode_step(model, params, state, token, policy=policy, kind=kind)
        return jnp.argmax(logits, axis=-1), state

    return Built(
        step,
        (params, state, array((batch,), jnp.int32)),
        _weight_bytes(config, params) + moved,
        donate=(1,),
        cache=state.cache,
        layers=config.layers,
    )


def _nested_loop(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    policy = make_policy("recycled", k=BUDGET, stride=STRIDE)
    fitting, params, state = _fit(chip, config, batch, policy)
    model = Llama(fitting, dtype=DTYPE, param_dtype=DTYPE)
    loop_state = jax.eval_shape(
        lambda state: LoopState(state, jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool), jax.random.key(0)), state
    )

    def block(params, state, limit):
        return run_block(
            model,
            params,
            state,
            limit,
            policy=policy,
            sampling=Sampling(),
            steps=STRIDE,
            stride=STRIDE,
            coverage=False,
            implementation=None,
        )

    moved = _refresh_bytes(state) + (STRIDE - 1) * _recycled_bytes(state)
    return Built(
        block,
        (params, loop_state, array((), jnp.int32)),
        STRIDE * _weight_bytes(fitting, params) + moved,
        donate=(1,),
        cache=state.cache,
        layers=fitting.layers,
    )


def _fit(chip: Chip, config: LlamaConfig, batch: int, policy: Policy) -> tuple[LlamaConfig, Any, DecodeState]:
    """The model with as many layers (halved again and again) as a device's memory holds beside the cache."""
    layers = config.layers
    while True:
        fitting = replace(config, layers=layers)
        params = params_of(fitting)
        state = jax.eval_shape(functools.partial(_state, fitting, batch, policy))
        if layers == 1 or nbytes((params, state)) < 0.85 * chip.hbm:
            return fitting, params, state
        layers //= 2


def _state(config: LlamaConfig, batch: int, policy: Policy) -> DecodeState:
    query = jnp.zeros((config.layers, batch, config.query_heads, 1, config.head_dim), DTYPE)
    seen, logits = QueryWindow(query, query), jnp.zeros((batch, config.vocab))
    prompts = PromptRecord(jnp.zeros(batch, jnp.int32), logits, (seen,), (LastQueries(1),), config)
    cache = model_cache(config, batch=batch, capacity=TOKENS, dtype=DTYPE, implementation=None)
    return begin(policy, Prefilled(cache, prompts))


def _weight_bytes(config: LlamaConfig, params: Any) -> int:
    """Every weight is read once; of an embedding table that is not also the output matrix, next to nothing."""
    table = 0 if config.tie_embeddings else nbytes(params["params"]["embed_tokens"])
    return nbytes(params) - table


def _recycled_bytes(state: DecodeState) -> int:
    return nbytes(state.kept.selection)


def _refresh_bytes(state: DecodeState) -> int:
    """The cache is read, the new selection fetched from it and written; its scores need not leave the chip."""
    return nbytes(state.cache) + 2 * nbytes(state.kept.selection)
