"""Writes `losses.json`, the losses of transformers trained by torch, for the parity test that runs without torch.

    python -m tests.train.parity.make_losses

Needs the extra `parity`. The weights, tokens and settings are those of the test; all that is done with them is torch's
own, or written here from its formula.
"""

import json
import math

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR

from tests.recycled_jax.parity.make_golden import torch_model
from tests.train.parity.runs import GOLDEN, RUNS, STEPS, Settings, batches, wrong


def rate(settings: Settings, step: int) -> float:
    """The learning rate of `step` (from 0) as a part of its peak: up from 0, then down towards `final` at `STEPS`."""
    if step < settings.warmup:
        return step / settings.warmup
    done = (step - settings.warmup) / (STEPS - settings.warmup)
    left = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return settings.final + (1 - settings.final) * left


def train(family: str, settings: Settings, *, vectors_decay: bool = False) -> dict[str, list[float]]:
    """The loss of every step, and the norm of its gradient before clipping."""
    model = torch_model(family).train()
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]  # norms and biases
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": settings.weight_decay if vectors_decay else 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
    )
    scheduler = LambdaLR(optimizer, lambda step: rate(settings, step))
    losses, norms = [], []
    for tokens in torch.from_numpy(batches()).long():
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, settings.clip).item())
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    return {"losses": losses, "gradient_norms": norms}


def all_runs(family: str) -> dict[str, dict[str, list[float]]]:
    """Every run of `runs.golden`."""
    right = RUNS[family]
    return {
        "right": train(family, right),
        "vectors decay": train(family, right, vectors_decay=True),
        **{name: train(family, settings) for name, settings in wrong(right).items()},
    }


def main() -> None:
    runs = {family: all_runs(family) for family in RUNS}
    versions = {library.__name__: library.__version__ for library in (torch, transformers)}
    GOLDEN.write_text(json.dumps({"versions": versions, "runs": runs}) + "\n")
    for family, named in runs.items():
        for name, run in named.items():
            print(f"{family}, {name}: loss {run['losses'][0]:.4f} to {run['losses'][-1]:.4f}")


if __name__ == "__main__":
    main()
