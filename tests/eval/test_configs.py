"""The configurations that ship with the project say what the programs understand."""

from pathlib import Path

import pytest

from eval.bench import BenchConfig
from eval.cells import TASKS
from eval.config import EvalConfig, chosen
from recycled_jax.config_flags import parse_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "eval").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_is_understood(path):
    kind = BenchConfig if path.stem.startswith("bench") else EvalConfig
    config = parse_config(kind, ["--config", str(path)], prog="eval", description="")
    assert chosen(config.policies, config.budgets)
    if isinstance(config, EvalConfig):
        assert {task if isinstance(task, str) else task["name"] for task in config.tasks} <= {*TASKS, "perplexity"}
