"""Where a figure comes from: versions, sources, device, command and date, and what it cost, kept beside it."""

import datetime
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def provenance() -> dict:
    """Of the running program, ready for JSON."""
    return {
        "date": _now(),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "machine": platform.machine()},
    }


def commit() -> str | None:
    """Of the sources, with a mark if they have been changed since; None outside a repository."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@contextmanager
def invocation() -> Iterator[Callable[[], dict[str, Any]]]:
    """Gives a function that tells of the program and what it has cost since then, ready for JSON. `compile_seconds` has
    the reading of programs from JAX's cache too."""
    began, started = time.monotonic(), _now()
    compiling: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiling.append(duration_secs)

    def told() -> dict[str, Any]:
        return {
            **provenance(),
            "arguments": sys.argv[1:],
            "git": commit(),
            "xla_flags": os.environ.get("XLA_FLAGS"),
            "started": started,
            "ended": _now(),
            "seconds": round(time.monotonic() - began, 3),
            "compile_seconds": round(sum(compiling), 3),
            "peak_memory_bytes": _peak_memory(),
        }

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield told
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _peak_memory() -> dict[str, int | None]:
    """The most that this process has had at once, and that its first device has, where that is known."""
    unit = 1 if sys.platform == "darwin" else 1024
    on_device: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    return {
        "process": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "device": on_device.get("peak_bytes_in_use"),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _module() -> str:
    name = sys.argv[0].rsplit("/", 1)[-1].removesuffix(".py")
    return "eval" if name == "__main__" else f"eval.{name}"
