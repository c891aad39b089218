"""Compiles one program for one chip in this process: `python -m tpu_check.compile CHIP PROGRAM DUMP OUT`.

Not for users: `tpu_check.jobs` starts it with the environment that the TPU compiler needs, because that is read before
the first import of JAX, and a crash of the compiler then ends one row and not the report. OUT gets the figures as JSON.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels import KVCache
from recycled_jax.planning.chips import CHIPS, Chip
from recycled_jax.planning.sizes import nbytes
from tpu_check import bundles, hlo
from tpu_check.bundles import Cost
from tpu_check.catalogue import catalogue
from tpu_check.programs import MODELS, Built, Program
from tpu_check.runs import RUNS


@dataclass(frozen=True)
class Figures:
    """What the compiler says of one program on one chip; bytes and microseconds. `bundles` count every trip of a loop.

    `unknown` names what has loops that were counted once for want of a trip count, `parts` are bundles by computation.
    `implementations`: `operation/name` of what ran. `layers`: how many were compiled, None for an operation.
    `attention_us`: `Built.attention_bytes` as time.
    """

    floor_bytes: int
    floor_us: float
    hbm_bytes: int
    hbm_us: float
    bundles: int
    bundle_us: float
    unknown: list[str]
    parts: dict[str, int]
    vmem: int
    temporaries: int
    aliased: int
    donated: int
    cache_bytes: int
    copies: list[str]
    tokens: int | None
    attention_us: float | None
    layers: int | None
    implementations: list[str]
    compile_seconds: float


def compile_program(program: Program, chip: Chip, dump: Path) -> Figures:
    """The figures of a program; the compiler must have been told to dump to `dump`."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    started = time.perf_counter()
    # The abstract mesh tells the library what it is traced for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        built = program.build(chip, MODELS[program.model], program.batch)
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), built.arguments
        )
        lowered = jax.jit(built.function, donate_argnums=built.donate).lower(*arguments)
        compiled = lowered.compile(dict(chip.compiler_options))
    seconds = time.perf_counter() - started
    return figures(
        program, chip, built, compiled.as_text() or "", compiled.memory_analysis(), bundles.read_dump(dump), seconds
    )


def figures(
    program: Program,
    chip: Chip,
    built: Built,
    text: str,
    memory: Any,
    dumped: dict[str, bundles.Computation],
    seconds: float,
) -> Figures:
    """Reads a compiled program: its HLO `text`, its `memory` analysis and its dumped computations."""
    module = hlo.parse(text)

    def cost_of(instruction: str) -> Cost | None:
        if instruction not in dumped:
            return None
        kernel = instruction.split(".")[0]  # what follows is a number, or the compiler's name for an operand
        return bundles.cost(dumped[instruction], RUNS[kernel](program, chip) if kernel in RUNS else ())

    cost = hlo.total(module, cost_of)
    cache = 0 if built.cache is None else nbytes(built.cache)
    return Figures(
        built.floor_bytes,
        chip.microseconds(bytes=built.floor_bytes, operations=built.floor_operations),
        cost.bytes,
        chip.microseconds(bytes=cost.bytes),
        cost.bundles,
        chip.microseconds(bundles=cost.bundles),
        list(cost.unknown) if dumped else ["every computation"],
        dict(sorted(cost.parts, key=lambda part: -part[1])),
        hlo.vmem_bytes(text),
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        nbytes([built.arguments[number] for number in built.donate]),
        cache,
        [] if built.cache is None else hlo.cache_copies(module, built.cache.capacity, _cache_sizes(built.cache)),
        built.tokens,
        None if built.attention_bytes is None else chip.microseconds(bytes=built.attention_bytes),
        built.layers,
        sorted(set(re.findall(r'op_name="[^"]*?(\w+/(?:pallas_tpu|xla|reference))/', text))),
        seconds,
    )


def _cache_sizes(cache: KVCache) -> set[int]:
    """Elements of the cache, of its keys or values, and of one layer of either."""
    keys = cache.layers * cache.batch * cache.kv_heads * cache.capacity * cache.head_dim
    return {2 * keys, keys, 2 * keys // cache.layers, keys // cache.layers}


if __name__ == "__main__":
    chip_name, program_name, dump, out = sys.argv[1:]
    result = compile_program(catalogue()[program_name], CHIPS[chip_name], Path(dump))
    Path(out).write_text(json.dumps(asdict(result)))
