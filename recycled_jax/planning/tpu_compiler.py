"""The TPU compiler on any machine: a module run in a process of its own, with the environment that libtpu reads before
the first import of JAX."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
BESIDE = "libtpu"  # folder in the environment's where `make tpu-check` puts it, out of JAX's sight


def compiler_version() -> str:
    """The version of libtpu. Raises ValueError, saying how to get it, where there is none."""
    beside = _beside()
    if find_spec("libtpu") is None and beside is None:
        raise ValueError(
            "libtpu, the TPU compiler, is not installed; `pip install 'recycled-jax[tpu-check]'` installs it, and no "
            "TPU is needed"
        )
    path = sys.path if beside is None else [*sys.path, str(beside)]
    return next((found.version for found in distributions(name="libtpu", path=path)), "of unknown version")


def _beside() -> Path | None:
    folder = Path(sys.prefix) / BESIDE
    return folder if folder.is_dir() else None


def alone(
    module: str, arguments: Sequence[str], out: Path, timeout: int, flags: str = ""
) -> dict[str, Any] | str | None:
    """Runs `python -m MODULE ARGUMENTS OUT` with the TPU compiler, `flags` for it, and no other beside it.

    Gives what is in the JSON file `out` then, a sentence if the process failed, None if it took more than `timeout`
    seconds.
    """
    command = [sys.executable, "-m", module, *arguments, str(out)]
    environment = {**os.environ, **_ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}
    beside = _beside()
    if beside is not None and find_spec("libtpu") is None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(beside))))
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
