"""What the devices of a mesh exchange, from the HLO of a compiled program."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tpu_check.hlo import Instruction, Module, operands, trips

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_TAKEN_TOO = ("all-gather-start", "collective-permute-start")  # what goes in comes first in their result


@dataclass(frozen=True)
class Collective:
    """An exchange, and how often a step runs it. `size`: bytes of what a device gets, and of a reduce-scatter of what
    it gives. `elements`: of the largest array in that. `scope`: what of the model it belongs to, as JAX names it."""

    kind: str
    name: str
    size: int
    elements: int
    times: int
    scope: str


def collectives(module: Module) -> list[Collective]:
    """All exchanges of a program. A loop without a known trip count counts once, of a conditional every branch."""
    return list(_of(module, module.entry, 1))


def bytes_by_kind(found: Sequence[Collective]) -> dict[str, int]:
    """Bytes that a device exchanges in a step; the kind with most of them first."""
    counted: Counter[str] = Counter()
    for exchange in found:
        counted[exchange.kind] += exchange.size * exchange.times
    return dict(counted.most_common())


def _of(module: Module, computation: str, times: int) -> Iterator[Collective]:
    instructions = module.computations.get(computation, [])
    by_name = {instruction.name: instruction for instruction in instructions}
    for instruction in instructions:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            # the TPU compiler writes a reduce-scatter as a fusion of this name around an all-reduce
            scatters = computation.startswith("all-reduce-scatter")
            yield _collective("reduce-scatter" if scatters else kind, instruction, by_name, times)
        elif instruction.opcode == "while":
            yield from _of(module, instruction.attribute("body") or "", times * (trips(module, instruction) or 1))
        elif instruction.opcode == "conditional":
            for branch in instruction.branches:
                yield from _of(module, branch, times)
        elif kind in ("fusion", "async"):
            yield from _of(module, instruction.attribute("calls") or "", times)
        elif kind == "call":
            yield from _of(module, instruction.attribute("to_apply") or "", times)


def _collective(kind: str, instruction: Instruction, by_name: Mapping[str, Instruction], times: int) -> Collective:
    names = operands(instruction)
    if instruction.opcode.startswith("reduce-scatter"):
        parts = [part for name in names if name in by_name for part in _parts(by_name[name])]
    else:
        taken = len(names) if instruction.opcode in _TAKEN_TOO else 0
        parts = _parts(instruction)[taken : 2 * taken or None]
    scope = re.search(r'op_name="([^"]*)"', instruction.text)
    return Collective(
        kind,
        instruction.name,
        sum(size for size, _ in parts),
        max((elements for _, elements in parts), default=0),
        times,
        scope[1] if scope else "",
    )


def _parts(instruction: Instruction) -> list[tuple[int, int]]:
    """Bytes and elements of every array that an instruction gives."""
    return [(size, math.prod(dims)) for size, dims in zip(instruction.sizes, instruction.dims, strict=True)]
