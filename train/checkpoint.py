"""Checkpoints of a run: the train state under `<out>/checkpoints/<step>`, written in the background, newest kept."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from train.config import TrainConfig
from train.step import TrainState


class Checkpoints:
    """Saves and restores the train state of one run directory."""

    def __init__(self, config: TrainConfig):
        self._root = Path(config.out).absolute() / "checkpoints"
        self._root.mkdir(parents=True, exist_ok=True)
        _refuse_other_config(Path(config.out) / "config.json", config)
        self._checkpointer = ocp.training.Checkpointer(
            self._root,
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
            cleanup_tmp_directories=True,
        )

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest complete checkpoint, laid out as `abstract`; None when there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else self._checkpointer.load(latest.step, abstract)

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing `state`; it may be donated to the next step as soon as this returns."""
        self._checkpointer.save_async(step, state, overwrite=True)

    def close(self) -> None:
        """Waits for writes under way."""
        self._checkpointer.close()


def _refuse_other_config(path: Path, config: TrainConfig) -> None:
    ours = json.loads(json.dumps(asdict(config)))
    if not path.exists():
        path.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        return
    theirs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in _RESULTS if theirs.get(name) != ours[name]]
    if changed:
        raise ValueError(
            f"out={config.out!r} holds a run with another {changed[0]}: {theirs.get(changed[0])!r} there, "
            f"{ours[changed[0]]!r} here; choose another out or restore the setting"
        )


# the settings that change what a run computes; the others may differ when it is resumed
_RESULTS = ("seed", "model", "data", "optimizer", "stages")
