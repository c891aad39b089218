"""The model that ships with the package."""

import pytest

from pallas_kernels import TokenMajor, interpreted
from recycled_jax.commands.loading import EMBEDDED, Checkpoint
from recycled_jax.generate import generate, read
from recycled_jax.policies import make_policy
from recycled_jax.tasks.retrieval import TASKS, make_example, score


def test_embedded_model_is_small():
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= 12e6


def test_embedded_model_answers_with_and_without_recycling():
    checkpoint = Checkpoint.find(None)
    model, params = checkpoint.load("float32")
    questions = [
        make_example(TASKS["multikey"], length=1024, seed=5, index=i, encode=checkpoint.text.encode) for i in range(4)
    ]
    prompts = [checkpoint.text.encode(example.prompt) for example in questions]
    prefilled = read(model, params, prompts, max_new_tokens=8)
    right = {}
    for name, knobs in (("full", {}), ("recycled", {"k": 128, "stride": 4}), ("streaming", {"k": 128})):
        done = generate(model, params, prefilled, policy=make_policy(name, **knobs), max_new_tokens=8)
        answers = [checkpoint.text.decode(tokens) for tokens in done.tokens]
        right[name] = sum(score(*pair) for pair in zip(questions, answers, strict=True))
    assert right["full"] == right["recycled"] == 4
    assert right["streaming"] <= 2


@pytest.mark.parametrize(("policy", "knobs"), [("full", {}), ("recycled", {"k": 48, "stride": 3})])
def test_embedded_model_decodes_through_the_tpu_kernels(policy, knobs):
    """Prefill, refreshes and recycled steps, every operation as its TPU kernel in the interpreter: the same tokens."""
    checkpoint = Checkpoint.find(None)
    model, params = checkpoint.load("float32")
    encode = checkpoint.text.encode
    examples = [make_example(TASKS["single"], length=n, seed=5, index=0, encode=encode) for n in (64, 90)]
    prompts = [encode(example.prompt) for example in examples]
    tokens = {}
    for implementation in (None, "pallas_tpu"):
        options = {"max_new_tokens": 8, "implementation": implementation}
        with interpreted():
            prefilled = read(model, params, prompts, chunk=64, **options)
            done = generate(model, params, prefilled, policy=make_policy(policy, **knobs), **options)
        assert isinstance(prefilled.cache, TokenMajor) == (implementation == "pallas_tpu")
        tokens[implementation] = done.tokens
    assert tokens[None] == tokens["pallas_tpu"]
