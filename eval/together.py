"""What the processes of a run agree on: what is left to answer, who answers it, and when all have."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from eval.cells import Cell

# place of a run → lines of a batch that it has not answered
Wanted = Mapping[int, set[int]]
# number of a batch → the same for each
Batches = Mapping[int, Wanted]


def batches(cell: Cell, size: int) -> Iterator[tuple[int, range]]:
    """The numbers of a cell's batches, and their lines: the same whoever answers them, and however often."""
    for number, first in enumerate(range(0, cell.examples, size)):
        yield number, range(first, min(first + size, cell.examples))


def left(cells: Sequence[Cell], done: np.ndarray, size: int) -> dict[Cell, Batches]:
    """The batches with lines that a run has not answered. `done` says which it has, [runs, lines of all cells]."""
    found, first = {}, 0
    for cell in cells:
        of_cell: dict[int, dict[int, set[int]]] = defaultdict(dict)
        for number, lines in batches(cell, size):
            for place, row in enumerate(done):
                if missing := {line for line in lines if not row[first + line]}:
                    of_cell[number][place] = missing
        found[cell] = dict(of_cell)
        first += cell.examples
    return found


def share(left: Mapping[Cell, Batches], size: int, *, process: int, processes: int) -> dict[Cell, Batches]:
    """What one of many processes answers. Batches are dealt out whole, as a row may differ in its last bits when others
    stand beside it: those with most tokens first, each to the process that has least so far."""
    tokens = {}
    for at, (cell, missing) in enumerate(left.items()):
        rows = {number: len(lines) for number, lines in batches(cell, size)}
        tokens |= {(at, number): cell.length * rows[number] * len(runs) for number, runs in missing.items()}
    load, mine = [0] * processes, set()
    for batch in sorted(tokens, key=lambda batch: -tokens[batch]):
        least = load.index(min(load))
        load[least] += tokens[batch]
        if least == process:
            mine.add(batch)
    return {
        cell: {number: runs for number, runs in missing.items() if (at, number) in mine}
        for at, (cell, missing) in enumerate(left.items())
    }


def told_by_first(find: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The array of bytes that the first process finds, on all of them: each could find another, at its own time. Raises
    on every process when it cannot be found (ValueError, OSError)."""
    if jax.process_count() == 1:
        return find()
    found, error = np.zeros(shape, np.uint8), None
    if jax.process_index() == 0:
        try:
            found = find()
        except (ValueError, OSError) as raised:
            error = raised
    failed, found = multihost_utils.broadcast_one_to_all((np.uint8(error is not None), found))
    if error is not None:
        raise error
    if failed:
        raise ValueError("the first process cannot begin, and says why")
    return found


def wait(name: str) -> None:
    """Until all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
