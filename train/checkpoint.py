"""Checkpoints of a run: train state and place in the data, `<out>/checkpoints/<step>`, written in the background."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from train.batches import Positions, from_array, to_array
from train.config import TrainConfig
from train.corpus import Position
from train.step import TrainState

# the settings that change what a run computes; the others may differ when it is resumed
_RESULTS = ("seed", "model", "data", "corpus", "optimizer", "stages", "dtype", "z_loss", "ema")
_NOT_RESULTS = ("max_corrupt", "accumulate")


class Saved(NamedTuple):
    """Where a run stands after a step."""

    state: TrainState
    positions: Positions


class Checkpoints:
    """Saves and restores where one run stands.

    `<out>/config.json` is the config of the checkpoints. Raises ValueError, naming a setting, when `out` has
    checkpoints of a run that would compute something else.
    """

    def __init__(self, config: TrainConfig):
        out = Path(config.out).absolute()
        out.mkdir(parents=True, exist_ok=True)
        self._folder, self._writing = config.out, None
        self._streams = config.corpus.streams if config.corpus else 0
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_every is not None:
            kept.append(policies.EveryNSteps(config.keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            str(out / "checkpoints"),
            # the policies that orbax ships are annotated with another metadata class than its own protocol
            preservation_policy=policies.AnyPreservationPolicy(kept),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )
        ours = json.loads(json.dumps(asdict(config)))
        theirs = {} if self.step is None else json.loads((out / "config.json").read_text(encoding="utf-8"))
        for name, there, here in _differences(theirs, ours) if theirs else ():
            if re.split(r"[.\[]", name)[0] in _RESULTS and name.split(".")[-1] not in _NOT_RESULTS:
                self.close()
                raise ValueError(
                    f"out={config.out!r} holds a run with another {name}: {there!r} there, {here!r} here; choose "
                    "another out or restore the setting"
                )
        if jax.process_index() == 0:
            partial = out / "config.json.partial"  # other hosts may be reading
            partial.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
            partial.replace(out / "config.json")

    @property
    def step(self) -> int | None:
        """Steps taken by the newest complete checkpoint; None when there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def restore(self, abstract: TrainState) -> Saved | None:
        """The newest complete checkpoint, laid out as `abstract`; None when there is none."""
        if self.step is None:
            return None
        tree: dict[str, Any] = {"state": abstract}
        if self._streams:
            tree["positions"] = np.zeros((self._streams, len(Position._fields)), np.int32)
        loaded = self._checkpointer.load(self.step, tree)
        return Saved(loaded["state"], from_array(loaded["positions"]) if self._streams else {})

    def save(self, step: int, state: TrainState, positions: Positions) -> None:
        """Starts writing; `state` may be donated to the next step as soon as this returns.

        Raises OSError when the save before it has failed.
        """
        self._finish()
        tree: dict[str, Any] = {"state": state}
        if self._streams:
            tree["positions"] = to_array(positions, self._streams)
        self._checkpointer.save_async(step, tree, overwrite=True, force=True)
        self._writing = step

    def close(self) -> None:
        """Waits for writes under way. Raises OSError when they fail."""
        try:
            self._finish()
        finally:
            self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        try:
            self.close()
        except OSError as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # what came first is what the user has to know

    def _finish(self) -> None:
        try:
            self._checkpointer.wait()
        except Exception as error:  # whatever the storage says; the run needs one sentence
            reason = str(error).strip().partition("\n")[0]
            raise OSError(
                f"the checkpoint of step {self._writing} could not be written to {self._folder}: {reason}"
            ) from error


def _differences(theirs: Any, ours: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, here in ours.items():
            yield from _differences(theirs.get(key), here, f"{name}.{key}" if name else key)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (there, here) in enumerate(zip(theirs, ours, strict=True)):
            yield from _differences(there, here, f"{name}[{number}]")
    elif theirs != ours:
        yield name, theirs, ours
