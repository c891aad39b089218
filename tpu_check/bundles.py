"""How many bundles (VLIW instructions, one cycle each) a compiled computation issues, from the compiler's own dump.

The compiler writes each computation as `*-NAME-*final_bundles.txt`, a bundle on each line. A loop is a backward branch
to a region; its trip count is a constant in its exit test, or has to be given. What stands under a predicate counts in
full.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GRANULE = 32  # bytes; the unit of a DMA's size in the dump
_DELAY_SLOTS = 6  # at most this many bundles after a branch are issued with it
_PIPELINE_STAGES = 4  # a pipelined grid runs at most this many steps more, for fetching ahead and writing back

_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +(?:(LH|LB|LE|PB|PF|CT))? *: *(>*) *\{(.*)", re.DOTALL)
_FILE = re.compile(r"^\d+-(.+?)-\d+-final_bundles\.txt$")
_BRANCH = re.compile(r"sbr\.rel \((!?%\w+)\) target = \$region(\d+)")
_TEST = re.compile(r"(%\w+) = scmp\.(ge|gt|eq)\.s32\.totalorder (?:\(!?%\w+\), )?(%\w+), (-?\d+)\b")
_ADD = re.compile(r"(%\w+) = sadd\.s32 (?:\(!?%\w+\), )?(\d+), (%\w+)")
_MOVE = re.compile(r"(%\w+) = smov (?:\(!?%\w+\), )?(%\w+|-?\d+)")
_PHI = re.compile(r"(%\w+) = sphi (%\w+), (%\w+)")
_STORE = re.compile(r"sst \[smem:\[#(allocation\d+_spill)\]\] (%\w+)")
_LOAD = re.compile(r"(%\w+) = sld \[smem:\[#(allocation\d+_spill)\]\]")
_DMA = re.compile(r"dma\.(\w+)[^;]*?/\*size_in_granules=\*/(\d+|%\w+)(.*?)(?=;;|$)", re.DOTALL)
_WALK = re.compile(
    r"\nbase_bounds: \(([\d, ]+)\).*\nwindow_bounds: \(([\d, ]+)\).*element_size_in_bytes: (\d+)", re.DOTALL
)
_CORE = re.compile(r"(%\w+) = sld \[smem:\[#allocation\w+\]\] /\*[^*]*\bcore id\b")
_ITERATIONS = re.compile(r"iteration_bounds: \(([\d, ]+)\)")


@dataclass(frozen=True)
class Transfer:
    """A DMA between HBM and the core: bytes of one, and of the whole array that a pipeline walks through (None: not
    known, as for a DMA that the kernel starts itself)."""

    size: int
    array: int | None = None


@dataclass(frozen=True)
class Loop:
    """`bundles` and `transfers` of its body without those of inner loops; `trips` None: not a constant in the code.
    `grid`: a pipeline over blocks, whose number is known."""

    bundles: int
    trips: int | None
    transfers: tuple[Transfer, ...] = ()
    inner: tuple["Loop", ...] = ()
    grid: bool = False


@dataclass(frozen=True)
class Computation:
    """One dumped computation. `root` stands for everything, as a loop that runs once. `split`: two cores share it."""

    name: str
    root: Loop
    split: bool = False


@dataclass(frozen=True)
class Cost:
    """Bundles issued by one core, and bytes moved between HBM and the device. `parts`: bundles by computation.

    `unknown` names the computations with loops (how many) whose trip counts are not known and that were counted once:
    then both figures are lower bounds.
    """

    bundles: int = 0
    bytes: int = 0
    unknown: tuple[str, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()

    def __add__(self, other: "Cost") -> "Cost":
        unknown = tuple(dict.fromkeys(self.unknown + other.unknown))
        return Cost(self.bundles + other.bundles, self.bytes + other.bytes, unknown, self.parts + other.parts)

    def times(self, trips: int) -> "Cost":
        parts = tuple((name, bundles * trips) for name, bundles in self.parts)
        return Cost(self.bundles * trips, self.bytes * trips, self.unknown, parts)


def cost(computation: Computation, runs: Sequence[float | None] = ()) -> Cost:
    """What one run of the computation costs.

    `runs` has an entry for every loop but pipelined grids, in the order of their first bundles: how often its body runs
    in all, on both cores together if the computation is split, or None where the constant in the code will do. With
    another number of entries it does not fit the code and is left aside.
    """
    given = iter(runs if len(runs) == _count(computation.root) else ())
    unknown = 0
    cores = 2 if computation.split else 1

    def walk(loop: Loop, times: float) -> tuple[float, float]:
        nonlocal unknown
        bundles = loop.bundles * times
        moved = sum(_moved(transfer, times * cores) for transfer in loop.transfers)
        for inner in loop.inner:
            in_all = None if inner.grid else next(given, None)
            if in_all is not None:
                inside = in_all / cores
            else:
                unknown += inner.trips is None
                inside = times * (1 if inner.trips is None else inner.trips)
            below = walk(inner, inside)
            bundles, moved = bundles + below[0], moved + below[1]
        return bundles, moved

    bundles, moved = (round(figure) for figure in walk(computation.root, 1))
    names = (f"{computation.name} ({unknown})",) if unknown else ()
    return Cost(bundles, moved, names, ((computation.name, bundles),))


def _count(loop: Loop) -> int:
    return sum((not inner.grid) + _count(inner) for inner in loop.inner)


def _moved(transfer: Transfer, times: float) -> float:
    # A pipeline fetches a block again only when its index changes, so at most the array goes through once.
    total = transfer.size * times
    return total if transfer.array is None else min(total, transfer.array)


def read_dump(folder: Path) -> dict[str, Computation]:
    """Every computation in a dump folder, by its name in the optimised HLO."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = _FILE.match(path.name)
        if match and not match[1].startswith("<"):
            found[match[1]] = parse(match[1], path.read_text(encoding="utf-8", errors="replace"))
    return found


@dataclass
class _Bundle:
    depth: int
    mark: str | None
    text: str
    region_starts: frozenset[str]


@dataclass
class _Span:
    first: int
    last: int
    predicate: str
    inner: list["_Span"] = field(default_factory=list)


def parse(name: str, text: str) -> Computation:
    """The computation that a `final_bundles` file describes."""
    bundles = list(_bundles(text))
    root = _Span(0, len(bundles) - 1, "")
    for span in sorted(_spans(bundles), key=lambda s: (s.first, -s.last)):
        parent = root
        while parent.inner and parent.inner[-1].last >= span.last:
            parent = parent.inner[-1]
        parent.inner.append(span)
    return Computation(name, _loop(bundles, root, _Constants(text)), _split(text))


def _split(text: str) -> bool:
    """Whether both cores work: the code asks which one it is on, and not in order to let all but the first skip it."""
    for core in _CORE.findall(text):
        only_first = re.search(rf"(%\w+) = scmp\.ne\.s32\.totalorder {core}, 0\b", text)
        return not (only_first and f"sbr.rel ({only_first[1]})" in text)
    return False


def _bundles(text: str) -> Iterator[_Bundle]:
    """A bundle may run over several lines; those after the first hold comments."""
    parts = re.split(r"\n(?= *(?:0x[0-9a-f]+|0) +(?:LH|LB|LE|PB|PF|CT)? *: )", text)
    for part in parts:
        match = _BUNDLE.match(part)
        if match:
            _, mark, depth, body = match.groups()
            starts = frozenset(re.findall(r"Start(?:/End empty)? region (\d+)", body))
            yield _Bundle(len(depth), mark, body, starts)


def _spans(bundles: list[_Bundle]) -> Iterator[_Span]:
    """Loops: from the first bundle of a region to the last delay slot of the branch back to it."""
    starts: dict[str, int] = {}
    for index, bundle in enumerate(bundles):
        for region in bundle.region_starts:
            starts.setdefault(region, index)
        for predicate, region in _BRANCH.findall(bundle.text):
            if region not in starts or bundles[starts[region]].mark not in ("LB", "LH"):
                continue
            first, last = starts[region], index
            for after in bundles[index + 1 : index + 1 + _DELAY_SLOTS]:
                empty = after.text.lstrip().startswith("}")
                if after.mark or not (empty or after.depth >= bundles[first].depth):
                    break
                last += 1
            yield _Span(first, last, predicate.lstrip("!"))


def _loop(bundles: list[_Bundle], span: _Span, constants: "_Constants") -> Loop:
    inside = {index for inner in span.inner for index in range(inner.first, inner.last + 1)}
    own = [bundles[i] for i in range(span.first, span.last + 1) if i not in inside]
    text = "\n".join(bundle.text for bundle in own)
    trips = constants.trips(span.predicate) if span.predicate else 1
    grids: list[int] = []
    if span.predicate and trips is not None:
        bounds = (_product(found) for found in _ITERATIONS.findall(text))
        grids = [grid for grid in bounds if 0 <= trips - grid <= _PIPELINE_STAGES]
        trips = max(grids, default=trips)
    inner = tuple(_loop(bundles, part, constants) for part in span.inner)
    transfers = tuple(transfer for bundle in own for transfer in _transfers(bundle.text))
    # A grid over blocks that lie in VMEM already has no transfers that would give its bounds.
    grid = trips is not None and (bool(grids) or "iteration index, stage" in bundles[span.first].text)
    return Loop(len(own), trips, transfers, inner, grid)


def _transfers(text: str) -> Iterator[Transfer]:
    for kind, granules, rest in _DMA.findall(text):
        if "hbm" not in kind:
            continue
        walk = _WALK.search(rest)
        array, window = (_product(walk[1]) * int(walk[3]), _product(walk[2]) * int(walk[3])) if walk else (None, 0)
        # a size in a register is that of a window which may hang over the array's end
        yield Transfer(int(granules) * GRANULE if granules.isdecimal() else window, array)


def _product(bounds: str) -> int:
    return math.prod(int(bound) for bound in bounds.split(","))


class _Constants:
    """Finds the trip count behind a loop's exit test: `counter + step >= bound`, the counter's first value known."""

    def __init__(self, text: str) -> None:
        self.tests = {test: (kind, counter, int(bound)) for test, kind, counter, bound in _TEST.findall(text)}
        self.adds = {name: (int(step), counter) for name, step, counter in _ADD.findall(text)}
        spilled = {slot: name for slot, name in _STORE.findall(text)}
        loads = {name: spilled[slot] for name, slot in _LOAD.findall(text) if slot in spilled}
        self.moves = loads | dict(_MOVE.findall(text))
        self.phis = {name: (first, again) for name, first, again in _PHI.findall(text)}

    def trips(self, predicate: str) -> int | None:
        if predicate not in self.tests:
            return None
        kind, counter, bound = self.tests[predicate]
        step, phi = self.adds.get(self._source(counter), (None, None))
        if step is None or phi is None or step == 0 or step >= 2**31:
            return None
        phi = self._source(phi)
        if phi not in self.phis:
            return None
        first = self._source(self.phis[phi][0])
        if not re.fullmatch(r"-?\d+", first):
            return None
        return max(1, math.ceil((bound + (kind == "gt") - int(first)) / step))

    def _source(self, name: str) -> str:
        for _ in range(8):
            if name not in self.moves:
                break
            name = self.moves[name]
        return name
