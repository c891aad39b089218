"""Every policy of the registry, on the model that ships with the package."""

import dataclasses

import pytest

from recycled_jax.commands.loading import Checkpoint
from recycled_jax.generate import generate, run_block
from recycled_jax.policies import POLICIES, make_policy
from recycled_jax.tasks.retrieval import TASKS, make_example

# Small enough to leave something of every prompt out.
KNOBS = {
    "full": {},
    "recycled-v1": {"k": 32, "stride": 4},
    "tidal": {"k": 32, "dense_layers": (0,), "selection_layers": (1, 3), "correct_every": 16},
    "recycled-tidal": {"k": 32, "dense_layers": (0,), "selection_layers": (1, 3)},
    "less-is-more": {"k": 32, "dense_layers": (0,), "selection_layers": (1, 3)},
    "long-heads": {"k": 64, "chunk": 16},
    "quest": {"k": 32, "page": 8},
    "token-select": {"k": 32, "sinks": 4, "recent": 8, "max_stride": 4},
    "tactic": {"k": 32, "exact_below": 64, "recluster": 8},
    "squeezed": {"k": 32, "window": 16, "iterations": 10},
    "infllm": {"k": 64, "block": 8, "sinks": 8, "recent": 16},
    "act-qkv": {"k": 64, "block": 8, "sinks": 8, "recent": 16},
    "attention-predictor": {"k": 64, "block": 8, "sinks": 8, "recent": 16, "history": 8},
    "cca": {"group": 8, "window": 32},
    "composed": {"selector": {"name": "top-k", "k": 32}},
}
BLOCK, BLOCKS = 8, 3


@pytest.mark.parametrize("name", POLICIES)
def test_decodes_single_and_ragged_with_one_program_each(name):
    """One program for all blocks of steps, so the state keeps its shapes; and a padded row is the row alone."""
    policy = make_policy(name, **KNOBS.get(name, {"k": 32}))
    checkpoint = Checkpoint.find(None)
    model, params = checkpoint.load("float32")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=()))  # no row stops early
    encode = checkpoint.text.encode
    examples = [make_example(TASKS["chain"], length=n, seed=1, index=0, encode=encode) for n in (230, 100, 185, 120)]
    prompts = [encode(example.prompt) for example in examples]
    generated = []
    for rows in (prompts, prompts[3:]):
        compiled = run_block._cache_size()
        done = generate(model, params, rows, policy=policy, max_new_tokens=1 + BLOCK * BLOCKS, block=BLOCK, chunk=128)
        assert run_block._cache_size() == compiled + 1
        assert [len(row) for row in done.tokens] == [1 + BLOCK * BLOCKS] * len(rows)
        generated.append(done.tokens[-1])
    assert generated[0] == generated[1]
