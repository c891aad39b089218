"""The programs of a setting, compiled in a process of their own."""

import json
import tempfile
from pathlib import Path

from recycled_jax.planning.programs import ProgramMemory, TooLarge
from recycled_jax.planning.setting import Setting
from recycled_jax.planning.tpu_compiler import alone, compiler_version

TIMEOUT = 1800  # seconds


def compile_programs(setting: Setting) -> list[ProgramMemory | TooLarge]:
    """What the compiler says of each program's memory; the last may be `TooLarge`.

    Raises ValueError where there is no compiler, and RuntimeError with its message where it fails.
    """
    compiler_version()
    with tempfile.TemporaryDirectory(prefix="recycled_plan_") as folder:
        given = Path(folder) / "setting.json"
        given.write_text(json.dumps(setting.to_json()))
        found = alone("recycled_jax.planning.programs", [str(given)], Path(folder) / "memory.json", TIMEOUT)
    if found is None:
        raise RuntimeError(f"the TPU compiler gave no result after {TIMEOUT} s")
    if isinstance(found, str):
        raise RuntimeError(f"the TPU compiler failed, {found}")
    return [_read(program) for program in found["programs"]]


def _read(program: dict) -> ProgramMemory | TooLarge:
    if "wanted" in program:
        return TooLarge(**program)
    return ProgramMemory(**{**program, "implementations": tuple(program["implementations"])})
