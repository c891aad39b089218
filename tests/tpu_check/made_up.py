"""Rows with made-up figures, for tests of what is done with them."""

from dataclasses import replace

from recycled_jax.planning.chips import CHIPS
from tpu_check.compile import Figures
from tpu_check.jobs import Row
from tpu_check.programs import LimitName, Program

FIGURES = Figures(
    floor_bytes=820_000_000,
    floor_us=1000.0,
    hbm_bytes=902_000_000,
    hbm_us=1100.0,
    bundles=1_500_000,
    bundle_us=998.0,
    unknown=[],
    parts={"kernel.1": 1_500_000},
    vmem=9_000_000,
    temporaries=1_000,
    aliased=2_000_000,
    donated=2_000_000,
    cache_bytes=1_000_000,
    copies=[],
    tokens=None,
    attention_us=None,
    layers=None,
    implementations=["decode_attention/pallas_tpu"],
    compile_seconds=1.5,
)


def program(
    limits: dict[LimitName, float] | None = None, operation: str = "decode_attention", batch: int = 1
) -> Program:
    def build(chip, config, batch):
        raise AssertionError("a test compiles nothing")

    return Program(operation, "8B", batch, "", build, limits or {})


def row(limits: dict[LimitName, float] | None = None, *, chip: str = "v5e", **changes) -> Row:
    return Row(program(limits), CHIPS[chip], replace(FIGURES, **changes))


def failed(error: str) -> Row:
    return Row(program({"ratio": 1.25}), CHIPS["v6e"], None, error)
