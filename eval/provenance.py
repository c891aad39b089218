"""Where a figure comes from: versions, device, command and date, kept beside it."""

import datetime
import platform
import shlex
import sys
from importlib.metadata import version

import jax


def provenance() -> dict:
    """Of the running program, ready for JSON."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "machine": platform.machine()},
    }


def _module() -> str:
    name = sys.argv[0].rsplit("/", 1)[-1].removesuffix(".py")
    return "eval" if name == "__main__" else f"eval.{name}"
