"""Runs each compile in a process of its own, one at a time."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_check.chips import Chip
from tpu_check.compile import Figures
from tpu_check.programs import Program

TIMEOUT = 900  # seconds for one compile
DUMP_TIMEOUT = 120  # seconds for one that writes its bundles too, which has been seen not to end

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # what a TPU machine would tell the compiler about itself
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    # nobody holds a TPU here, so another process with the compiler loaded is no reason to stop
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Row:
    """A program on a chip: its figures, or why there are none."""

    program: Program
    chip: Chip
    figures: Figures | None
    error: str = ""


def run(program: Program, chip: Chip) -> Row:
    """Compiles the program for the chip; never raises for what the compiler does.

    Where it does not come to an end with writing its bundles, it is compiled once more without: then they are unknown.
    """
    row = _compile(program, chip, DUMP_TIMEOUT, dumps=True) or _compile(program, chip, TIMEOUT)
    return row or Row(program, chip, None, f"no result after {TIMEOUT} s")


def _compile(program: Program, chip: Chip, timeout: float, *, dumps: bool = False) -> Row | None:
    """None if it did not end in time."""
    with tempfile.TemporaryDirectory(prefix="tpu_check_") as folder:
        dump, out = Path(folder) / "dump", Path(folder) / "figures.json"
        dump.mkdir()
        to, what = f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_pass_label_regex=final.bundles"
        flags = f"{to} --xla_jf_dump_llo_text=true {what}" if dumps else ""
        found = alone("tpu_check.compile", [chip.name, program.name, str(dump)], out, timeout, flags)
    if found is None:
        return None
    return Row(program, chip, None, found) if isinstance(found, str) else Row(program, chip, Figures(**found))


def alone(
    module: str, arguments: Sequence[str], out: Path, timeout: float, flags: str = ""
) -> dict[str, Any] | str | None:
    """Runs `python -m MODULE ARGUMENTS OUT` with the TPU compiler, `flags` for it, and no other beside it.

    Gives what is in the JSON file `out` then, a sentence if the process failed, None if it took more than `timeout`
    seconds.
    """
    command = [sys.executable, "-m", module, *arguments, str(out)]
    environment = {**os.environ, **_ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}
    with _one_at_a_time():
        try:
            done = subprocess.run(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return None
    if done.returncode or not out.exists():
        return _reason(done.returncode, done.stderr.decode(errors="replace"))
    return json.loads(out.read_text())


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Waits until no other process of this kind runs: the TPU compiler serves one process at a time."""
    with open(Path(tempfile.gettempdir()) / "tpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _reason(status: int, stderr: str) -> str:
    """The last line of a traceback that says something, in one line and not too long."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].split(".")[-1].endswith(("Error", "Exception", "Failure"))]
    said = errors[-1] if errors else lines[-1] if lines else "no message"
    return f"exit status {status}: {said[:400]}"
