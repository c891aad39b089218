"""Checkpoints of a run: the train state under `<out>/checkpoints/<step>`, written in the background, newest kept."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from train.config import TrainConfig
from train.step import TrainState

# the settings that change what a run computes; the others may differ when it is resumed
_RESULTS = ("seed", "model", "data", "optimizer", "stages", "dtype", "z_loss")


class Checkpoints:
    """Saves and restores the train state of one run directory.

    `<out>/config.json` is the config of the checkpoints. Raises ValueError, naming a setting, when `out` has
    checkpoints of a run that would compute something else.
    """

    def __init__(self, config: TrainConfig):
        out = Path(config.out).absolute()
        out.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            str(out / "checkpoints"),
            # the policies that orbax ships are annotated with another metadata class than its own protocol
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )
        ours = json.loads(json.dumps(asdict(config)))
        if self.step is None:
            (out / "config.json").write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
            return
        theirs = json.loads((out / "config.json").read_text(encoding="utf-8"))
        for name, there, here in _differences(theirs, ours):
            if name.split(".")[0] in _RESULTS:
                self.close()
                raise ValueError(
                    f"out={config.out!r} holds a run with another {name}: {there!r} there, {here!r} here; choose "
                    "another out or restore the setting"
                )

    @property
    def step(self) -> int | None:
        """Steps taken by the newest complete checkpoint; None when there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest complete checkpoint, laid out as `abstract`; None when there is none."""
        return None if self.step is None else self._checkpointer.load(self.step, abstract)

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing `state`; it may be donated to the next step as soon as this returns."""
        self._checkpointer.save_async(step, state, overwrite=True)

    def close(self) -> None:
        """Waits for writes under way."""
        self._checkpointer.close()


def _differences(theirs: dict, ours: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name, here in ours.items():
        there = theirs.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            yield from _differences(there, here, f"{prefix}{name}.")
        elif there != here:
            yield prefix + name, there, here
