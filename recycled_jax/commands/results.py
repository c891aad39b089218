"""A JSON Lines file of results that an interruption cannot spoil, and that a later run takes up where it was left.

Rows are appended and flushed to the disk together. `FILE.settings.json` beside it says what they were made with.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recycled_jax.commands.prompts import Prompt

# What a row says of its own, beside the fields carried over from the prompt.
FIELDS = (
    "index",
    "text",
    "tokens",
    "log_prob_sum",
    "log_prob_mean",
    "stop",
    "policy",
    "effective_stride",
    "kv_bytes_per_token",
    "prompt_sha256",
)


class Results:
    """The results of `prompts` under `settings`, in the file `path`; a context manager that closes it.

    `finished` are the indices of rows that are there. A last line without its end, left by a run that was killed, is
    cut. Raises OSError when the file cannot be written, ValueError when it holds anything but rows of these prompts
    under these settings; nothing is changed then.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], prompts: Sequence[Prompt]):
        self.path = path
        self._sidecar = path.with_name(f"{path.name}.settings.json")
        self._file = path.open("ab")
        try:
            self.finished, whole = self._read(prompts)
            if self.finished:
                self._compare(settings)
            else:
                self._write_settings(settings)
            self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows; when it returns they are on the disk."""
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        self._file.write(lines.encode("utf-8", "surrogatepass"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.finished |= {row["index"] for row in rows}

    def _read(self, prompts: Sequence[Prompt]) -> tuple[set[int], int]:
        """The indices of the whole lines, and the bytes they fill."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        finished: set[int] = set()
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                index, digest = row["index"], row["prompt_sha256"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"out={str(self.path)!r} line {number} is not a result of `recycled generate`; name a new file"
                ) from error
            if index not in range(len(prompts)) or prompts[index].digest != digest:
                raise ValueError(
                    f"out={str(self.path)!r} line {number} answers another prompt than number {index} of the prompts; "
                    "name a new file"
                )
            finished.add(index)
        return finished, whole

    def _compare(self, settings: Mapping[str, Any]) -> None:
        if not self._sidecar.exists():
            raise ValueError(
                f"out={str(self.path)!r} holds results, but {self._sidecar.name}, which says what they were made with, "
                "is missing; name a new file"
            )
        try:
            before = json.loads(self._sidecar.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self._sidecar} is not valid JSON; name a new out file") from error
        before, now = _flatten(before), _flatten(json.loads(json.dumps(settings)))
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"out={str(self.path)!r} was written with {name}={before.get(name)!r}, this run has "
                    f"{now.get(name)!r}; name a new file, or take the settings in {self._sidecar.name}"
                )

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        partial = self._sidecar.with_name(f".{self._sidecar.name}.{os.getpid()}")
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        partial.replace(self._sidecar)


def _flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    flat = {}
    for name, value in settings.items():
        flat |= _flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat
