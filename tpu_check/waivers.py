"""Limits that cannot be kept, each with the looser bound that is kept instead, and programs that are not compiled; each
with its reason."""

from tpu_check.chips import Chip
from tpu_check.limits import Waiver
from tpu_check.programs import Program

WAIVERS: tuple[Waiver, ...] = (
    Waiver(
        "select_tokens/per_head/8B/b1",
        "tpu7x",
        "select",
        0.18,
        "the order of eviction comes on top of the selection itself, which keeps the limit, pooled too (`unordered`); "
        "this chip's memory is 4.5 times as fast as a v5e's, its clock 1.5 times",
    ),
    Waiver("select_tokens/per_head/8B/b8", "tpu7x", "select", 0.18, "as for a batch of 1"),
    Waiver(
        "select_tokens/per_head/8B/b8",
        "v5p",
        "select",
        0.15,
        "below the limit as far as it is known: XLA copies the scores between two kernels, and the dump does not tell "
        "the trips of that copy; its bytes are counted",
    ),
    Waiver(
        "decode",
        "tpu7x",
        "temporaries",
        0.75,
        "XLA writes the weights of the layers again before the loop over them, in tiles of 8 rows, not 16; nothing "
        "of the cache is copied",
    ),
)

# Left out of a run over everything; `--only` compiles them all the same.
OMITTED: dict[tuple[str, str, str], str] = {
    ("decode", "8B", "tpu7x"): "the compiler works for more than 4 minutes on one fusion that lays weights out anew",
}


def omitted(program: Program, chip: Chip) -> bool:
    """Whether a run over everything leaves the program out on this chip."""
    return (program.operation, program.model, chip.name) in OMITTED
