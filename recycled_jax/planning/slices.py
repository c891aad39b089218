"""TPU slices by the names that Cloud TPU gives them, and what the compiler calls them.

A number in a name counts chips for v5e and v6e, and cores, two to a chip, for v5p; a v5p chip is one JAX device.
"""

from dataclasses import dataclass

from recycled_jax.planning.chips import CHIPS, Chip


@dataclass(frozen=True)
class Slice:
    """A slice of `devices` JAX devices; `topology` is the compiler's name of it."""

    name: str
    chip: Chip
    topology: str
    devices: int


# All of them compile with libtpu 0.0.50.
_GRIDS = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {2: "1x1x1", 8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"},
}
SLICES = {
    f"{chip}-{count}": Slice(f"{chip}-{count}", CHIPS[chip], f"{chip}:{grid}", count // CHIPS[chip].cores)
    for chip, grids in _GRIDS.items()
    for count, grid in grids.items()
}


def find_slice(topology: str) -> Slice:
    """The slice of that name. Raises ValueError, listing all, for one that is not known."""
    if topology in SLICES:
        return SLICES[topology]
    raise ValueError(f"{topology=} is not known; expected one of {', '.join(SLICES)}")


def larger(slice_: Slice) -> list[Slice]:
    """The slices of the same chip with more devices, smallest first."""
    same = [other for other in SLICES.values() if other.chip == slice_.chip and other.devices > slice_.devices]
    return sorted(same, key=lambda other: other.devices)
