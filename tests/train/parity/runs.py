"""The training runs that are compared with transformers + torch: what is trained, on which tokens, how.

Plain numbers and numpy, because both sides read them: `make_losses` without jax, the test without torch.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

STEPS = 20
GOLDEN = Path(__file__).parent / "losses.json"
_BATCH, _TOKENS, _VOCAB = 4, 32, 64


@dataclass(frozen=True)
class Settings:
    """AdamW and its learning rate, named as in `train.config.Optimizer`.

    `eps` and `weight_decay` are larger than usual, so that a wrong one shows within 20 steps; about half of the
    gradients are longer than `clip`.
    """

    schedule: str
    learning_rate: float = 1e-2
    warmup: int = 4
    final: float = 0.1
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-4
    clip: float = 3.0
    weight_decay: float = 0.3


# The right settings for each checkpoint of `tests.recycled_jax.parity.families`.
RUNS = {"llama_3": Settings("cosine"), "qwen2_tied": Settings("linear")}


def wrong(right: Settings) -> dict[str, Settings]:
    """Settings that differ from `right` in one field, by its name."""
    others = {
        "schedule": "linear" if right.schedule == "cosine" else "cosine",
        "learning_rate": 1.01e-2,
        "warmup": 3,
        "final": 0.0,
        "b1": 0.95,
        "b2": 0.999,
        "eps": 1e-8,
        "clip": 1e9,
        "weight_decay": 0.2,
    }
    return {name: replace(right, **{name: value}) for name, value in others.items()}


def batches() -> np.ndarray:
    """int32 `[STEPS, batch, tokens]`: after most tokens comes the one that a fixed permutation says, which a model can
    learn, and after the others any."""
    # RandomState, because its streams are frozen: default_rng's may change between numpy releases
    random = np.random.RandomState(0)
    follows = random.permutation(_VOCAB)
    tokens = random.randint(0, _VOCAB, (STEPS, _BATCH, _TOKENS))
    by_rule = random.random_sample(tokens.shape) < 0.8
    for at in range(1, _TOKENS):
        tokens[..., at] = np.where(by_rule[..., at], follows[tokens[..., at - 1]], tokens[..., at])
    return tokens.astype(np.int32)


def golden(family: str) -> dict[str, dict[str, np.ndarray]]:
    """What `make_losses` wrote: `losses` and `gradient_norms` (before clipping), float64 `[STEPS]`, with the `right`
    settings, with each of the `wrong` ones, and with the right ones where `vectors decay`."""
    runs = json.loads(GOLDEN.read_text())["runs"][family]
    return {name: {field: np.asarray(values) for field, values in run.items()} for name, run in runs.items()}
