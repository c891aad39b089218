"""Runs each compile in a process of its own, one at a time."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from recycled_jax.planning.chips import Chip
from recycled_jax.planning.tpu_compiler import alone
from tpu_check.compile import Figures
from tpu_check.programs import Program

TIMEOUT = 900  # seconds for one compile
DUMP_TIMEOUT = 120  # seconds for one that writes its bundles too, which has been seen not to end


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


def _compile(program: Program, chip: Chip, timeout: int, *, dumps: bool = False) -> Row | None:
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
