"""What is left of an evaluation is divided evenly, in whole batches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eval.together import batches, left, share


@dataclass(frozen=True)
class Cell:
    """Of a cell, what dealing asks for."""

    length: int
    examples: int


CELLS: Any = [Cell(512, 11), Cell(1024, 4), Cell(2048, 1)]
SIZE = 3


@given(done=st.lists(st.booleans(), min_size=2 * 16, max_size=2 * 16), processes=st.integers(1, 4))
def test_all_that_is_left_is_dealt_out_once_and_evenly(done, processes):
    of_runs = np.array(done, np.uint8).reshape(2, 16)
    found = left(CELLS, of_runs, SIZE)
    shares = [share(found, SIZE, process=process, processes=processes) for process in range(processes)]
    tokens, first = [0] * processes, 0
    for cell in CELLS:
        lines_of = dict(batches(cell, SIZE))
        missing = {(run, line) for run in range(2) for line in range(cell.examples) if not of_runs[run, first + line]}
        first += cell.examples
        dealt = [
            (process, number, run, line)
            for process, mine in enumerate(shares)
            for number, runs in mine[cell].items()
            for run, lines in runs.items()
            for line in lines
        ]
        assert sorted((run, line) for *_, run, line in dealt) == sorted(missing)
        assert all(line in lines_of[number] for _, number, _, line in dealt)
        assert len({number for _, number, *_ in dealt}) == len({(process, number) for process, number, *_ in dealt})
        for process, number, _ in {(process, number, run) for process, number, run, _ in dealt}:
            tokens[process] += cell.length * len(lines_of[number])
    assert max(tokens) - min(tokens) <= 2 * 2 * 1536  # the largest batch of both runs


def test_after_an_interruption_no_process_is_left_idle():
    """Every second batch was answered: dealt out by their numbers, the rest would all be one process's."""
    [cell] = [Cell(512, 24)]
    done = np.array([[line // SIZE % 2 for line in range(24)]], np.uint8)
    found = left([cell], done, SIZE)  # pyright: ignore[reportArgumentType]
    assert [list(share(found, SIZE, process=process, processes=2)[cell]) for process in range(2)] == [[0, 4], [2, 6]]
