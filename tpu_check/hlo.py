"""The optimised HLO text of a compiled program: what runs how often, and which instructions copy the cache."""

import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from tpu_check.bundles import Cost

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.<>-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.<>-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')

# What may have the shape of the cache without being a copy of it: names for what exists already, and updates in place.
_NO_COPY = frozenset(
    {
        "parameter",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "while",
        "conditional",
        "call",
        "optimization-barrier",
        "custom-call",
        "async-start",
        "async-update",
        "async-done",
        "copy-done",
        "dynamic-update-slice",
        "scatter",
    }
)


@dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`; `dims`, `sizes` (bytes) and `in_vmem` are those of every part of a
    tuple."""

    name: str
    opcode: str
    dims: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    in_vmem: tuple[bool, ...]
    text: str  # from the operands on
    root: bool

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        match = re.search(rf"\b{name}=%?([\w.<>-]+)", self.text)
        return match[1] if match else None

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        if listed:
            return [name.strip().lstrip("%") for name in listed[1].split(",")]
        return [name for name in map(self.attribute, ("true_computation", "false_computation")) if name]


@dataclass(frozen=True)
class Module:
    """The computations of a program; `entry` names the one it starts with."""

    computations: dict[str, list[Instruction]]
    entry: str

    @property
    def fused(self) -> set[str]:
        """Computations that exist only inside a fusion."""
        return {
            name
            for instructions in self.computations.values()
            for instruction in instructions
            if instruction.opcode == "fusion" and (name := instruction.attribute("calls")) is not None
        }


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` describes."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    current: list[Instruction] | None = None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_instruction(match[2], match[3], root=bool(match[1])))
    return Module(computations, entry)


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
    end = _balanced(text) if text.startswith("(") else text.find(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, operands = rest.partition("(")
    parts = [
        (kind, bits, tuple(int(d) for d in dims.split(",") if d), place)
        for kind, bits, dims, place in _SHAPE.findall(shape)
    ]
    sizes = tuple(math.prod(dims) * int(bits or 8) // 8 for _, bits, dims, _ in parts)  # pred has no number and a byte
    in_vmem = tuple("S(1)" in place for *_, place in parts)
    return Instruction(name, opcode, tuple(dims for _, _, dims, _ in parts), sizes, in_vmem, operands, root)


def _balanced(text: str) -> int:
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index + 1
    return len(text)


def total(module: Module, cost_of: Callable[[str], Cost | None]) -> Cost:
    """The cost of one run of the program, from that of its instructions; of a conditional, its dearest branch. A loop
    without a known trip count is named in `unknown` and counted once."""

    def of(name: str) -> Cost:
        result = Cost()
        for instruction in module.computations.get(name, ()):
            if instruction.opcode == "while":
                body, count = of(instruction.attribute("body") or ""), trips(module, instruction)
                if count is None:
                    body += Cost(unknown=(instruction.name,))
                result += body.times(count or 1)
            elif instruction.opcode == "conditional":
                result += max((of(branch) for branch in instruction.branches), key=lambda c: c.bundles, default=Cost())
            elif instruction.opcode == "call":
                result += of(instruction.attribute("to_apply") or "")
            else:
                result += Cost(bytes=_prefetched(instruction)) + (cost_of(instruction.name) or Cost())
        return result

    return of(module.entry)


def _prefetched(instruction: Instruction) -> int:
    """Bytes that the program itself moves between HBM and VMEM, before or after the computation that needs them."""
    # (destination, source, context) and (source, destination, context)
    which = {"copy-start": 0, "slice-start": 1}.get(instruction.opcode)
    if which is None or instruction.in_vmem[0] == instruction.in_vmem[1]:
        return 0
    return instruction.sizes[which]


def trips(module: Module, loop: Instruction) -> int | None:
    """How often a while loop runs that counts from 0 to a constant, as `scan` does; None for any other."""
    condition = module.computations.get(loop.attribute("condition") or "", ())
    parts = {part.name: part for part in condition}
    for part in condition:
        if part.root and part.opcode == "compare" and "direction=LT" in part.text:
            bound = parts.get(operands(part)[1])
            number = bound and bound.opcode == "constant" and re.match(r"(\d+)\)", bound.text)
            return int(number[1]) if number else None
    return None


def vmem_bytes(text: str) -> int:
    """The most VMEM that one instruction of the program takes for itself."""
    return max((int(size) for size in _VMEM.findall(text)), default=0)


def cache_copies(module: Module, capacity: int, sizes: Collection[int]) -> list[str]:
    """Instructions that write an array with as many elements as the cache or a layer of it (`sizes`), one of its
    dimensions being `capacity` slots, and are not an update in place. Each is `opcode name[dims]`."""

    def is_cache(dims: tuple[int, ...]) -> bool:
        return math.prod(dims) in sizes and any(dim % capacity == 0 for dim in dims if dim)

    fused = module.fused
    return [
        f"{kind} {instruction.name}[{','.join(map(str, dims))}]"
        for name, instructions in module.computations.items()
        if name not in fused
        for instruction in instructions
        for kind, dims in _written(module, instruction)
        if kind not in _NO_COPY and is_cache(dims)
    ]


def _written(module: Module, instruction: Instruction) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What an instruction writes: the operation that makes each part of its result, and the part's dimensions."""
    if instruction.opcode == "copy-start":  # (destination, source, context)
        yield "copy-start", instruction.dims[0]
    elif instruction.opcode == "fusion":
        body = {part.name: part for part in module.computations.get(instruction.attribute("calls") or "", ())}
        root = next((part for part in body.values() if part.root), None)
        if root is None:
            return
        parts = operands(root) if root.opcode == "tuple" else [root.name]
        for part, dims in zip(parts, instruction.dims, strict=False):
            yield _maker(module, body, part), dims
    else:
        for dims in instruction.dims:
            yield instruction.opcode, dims


def _maker(module: Module, body: dict[str, Instruction], name: str) -> str:
    """The operation behind a name in a fused computation, seen through bitcasts and nested fusions."""
    while name in body and body[name].opcode == "bitcast" and operands(body[name]):
        name = operands(body[name])[0]
    if name not in body:
        return "parameter"
    if body[name].opcode == "fusion":
        inner = {part.name: part for part in module.computations.get(body[name].attribute("calls") or "", ())}
        root = next((part.name for part in inner.values() if part.root), None)
        return "fusion" if root is None else _maker(module, inner, root)
    return body[name].opcode


def operands(instruction: Instruction) -> list[str]:
    """The names of what an instruction takes."""
    return re.findall(r"%([\w.<>-]+)", instruction.text[: _balanced("(" + instruction.text) - 1])
