"""Prefill methods beside their numpy oracles."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from recycled_jax.config import LlamaConfig
from recycled_jax.decode import Prefilled
from recycled_jax.frame import PrefillAttention
from recycled_jax.generate import Generation, generate, read
from recycled_jax.policies import Policy, make_policy
from tests.recycled_jax.policies.numpy_llama import Full, NumpyPolicy
from tests.recycled_jax.prefill.numpy_prefill import NumpyPrefill, PrefilledLlama
from tests.recycled_jax.random_model import CONFIG, tiny_model

NEW = 10


def read_by(
    prefill: PrefillAttention | None, rows: Sequence[Sequence[int]], *, chunk: int, config: LlamaConfig = CONFIG
) -> Prefilled:
    """The prompts; read densely where there is no prefill attention."""
    model, params = tiny_model(config)
    policy = make_policy("full")
    policy = policy if prefill is None else dataclasses.replace(policy, prefill=prefill)
    return read(model, params, rows, policies=[policy], max_new_tokens=NEW, chunk=chunk)


def continued(
    prefilled: Prefilled, policy: Policy | None = None, config: LlamaConfig = CONFIG, new_tokens: int = NEW
) -> Generation:
    """Densely, where there is no policy."""
    model, params = tiny_model(config)
    policy = make_policy("full") if policy is None else policy
    return generate(model, params, prefilled, policy=policy, max_new_tokens=new_tokens, block=16)


def assert_equals_oracle(
    prefill: PrefillAttention,
    oracle: Callable[[], NumpyPrefill],
    rows: Sequence[Sequence[int]],
    *,
    chunk: int,
    config: LlamaConfig = CONFIG,
) -> None:
    """What the prompts leave is what they leave in numpy, which gets each row by itself.

    The keys of a layer tell what all tokens have read in the layers below it, the logits what the last one has read in
    all layers.
    """
    prefilled = read_by(prefill, rows, chunk=chunk, config=config)
    _, params = tiny_model(config)
    for row, prompt in enumerate(rows):
        llama = PrefilledLlama(config, params, oracle(), Full())
        logits = llama.read(prompt)
        for layer in range(config.layers):
            ours = prefilled.cache.keys(layer)[row, :, : len(prompt)]
            np.testing.assert_allclose(ours, np.stack(llama.layers[layer].k, axis=1), atol=2e-4)
        np.testing.assert_allclose(prefilled.prompts.logits[row], logits, atol=2e-3)


def assert_decodes_like_oracle(
    prefill: PrefillAttention,
    oracle: Callable[[], NumpyPrefill],
    rows: Sequence[Sequence[int]],
    *,
    chunk: int,
    policies: Sequence[tuple[Policy, Callable[[], NumpyPolicy]]],
) -> None:
    """Decoding under any policy goes on from there."""
    prefilled = read_by(prefill, rows, chunk=chunk)
    _, params = tiny_model()
    for policy, numpy_policy in policies:
        tokens = continued(prefilled, policy).tokens
        for row, prompt in enumerate(rows):
            assert tokens[row] == PrefilledLlama(CONFIG, params, oracle(), numpy_policy()).generate(prompt, NEW)
