"""Every program that is checked: the operations, then whole decode programs."""

from tpu_check.decode_programs import decode_programs
from tpu_check.operations import operations
from tpu_check.programs import Program


def catalogue() -> dict[str, Program]:
    """All programs by name."""
    return {program.name: program for program in (*operations(), *decode_programs())}
