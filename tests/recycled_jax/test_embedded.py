"""The model that ships with the package."""

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
