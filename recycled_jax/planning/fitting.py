"""What fits into the memory of a slice, by shapes: nothing here compiles."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from recycled_jax.mesh import MeshSizes
from recycled_jax.planning.setting import Setting, default_mesh
from recycled_jax.planning.sizes import sizes
from recycled_jax.planning.slices import larger

# What the compiler keeps of a device's memory for itself: 15.75 of the 16 GiB of a v5e are there for programs.
USABLE = 0.975


@dataclass(frozen=True)
class Change:
    """A setting that fits, and how it differs from the one that does not. `needs`: bytes per device, by shapes."""

    setting: Setting
    words: str
    needs: int

    def __str__(self) -> str:
        return f"{self.words} fits ({self.needs / 1e9:.1f} GB per device, by arithmetic, not compiled)"


def available(setting: Setting) -> int:
    """Bytes of a device that programs can use."""
    return int(USABLE * setting.slice.chip.hbm)


def needed(setting: Setting, temporaries: int = 0) -> int:
    """Bytes per device: what lies there, and `temporaries`."""
    return sizes(setting).total + temporaries


def largest_batch(setting: Setting, temporaries: int = 0) -> int:
    """The largest batch that fits on this mesh; 0 if none does. `temporaries` are those of the setting's own batch, and
    are taken to grow with the batch, but not to shrink."""
    held, room, rows = sizes(setting), available(setting), setting.rows
    row = (held.cache + held.selection) / rows
    fewer = math.floor((room - held.weights - temporaries) / row)
    found = fewer if fewer <= rows else math.floor((room - held.weights) / (row + temporaries / rows))
    return max(found, 0) * setting.mesh.data * setting.mesh.fsdp


def nearest_change(setting: Setting, temporaries: int = 0) -> Change | None:
    """The first that fits of: another mesh, fewer rows, a cache of int8, a larger slice; None if nothing does."""
    for other, words in _changes(setting, temporaries):
        needs = needed(other, temporaries)
        if needs <= available(other):
            return Change(other, words, needs)
    return None


def _changes(setting: Setting, temporaries: int) -> Iterator[tuple[Setting, str]]:
    yield from _other_meshes(setting)
    best = largest_batch(setting, temporaries)
    if 0 < best < setting.batch:
        yield replace(setting, batch=best), f"--batch {best} instead of {setting.batch}"
    for batch in range(setting.batch - 1, 0, -1):  # few rows may want another mesh
        mesh = default_mesh(setting.config, setting.slice, batch=batch)
        words = f"--batch {batch} instead of {setting.batch}, on the mesh {spelled(mesh)},"
        yield replace(setting, batch=batch, mesh=mesh), words
    if setting.cache_dtype is None and setting.mesh.sequence == 1:
        yield replace(setting, cache_dtype="int8"), "--cache-dtype int8"
    for slice_ in larger(setting.slice):
        mesh = default_mesh(setting.config, slice_, batch=setting.batch)
        yield replace(setting, topology=slice_.name, mesh=mesh), f"--topology {slice_.name}"


def _other_meshes(setting: Setting) -> Iterator[tuple[Setting, str]]:
    """All that divide evenly, those first that hold fewest bytes; `sequence` after those without it. None with `fsdp`,
    whose weights every step would gather."""
    devices = setting.slice.devices
    counts = [count for count in range(1, devices + 1) if devices % count == 0]
    found = []
    for tensor in counts:
        for sequence in counts:
            if devices % (tensor * sequence):
                continue
            mesh = MeshSizes(devices // (tensor * sequence), 1, tensor, sequence)
            try:
                other = replace(setting, mesh=mesh)
            except ValueError:  # divides what it cannot
                continue
            if mesh != setting.mesh:
                found.append(other)
    found.sort(key=lambda other: (other.mesh.sequence, needed(other)))
    for other in found:
        yield other, f"--mesh {spelled(other.mesh)}"


def spelled(mesh: MeshSizes) -> str:
    """A mesh as its flag takes it, axes of one device left out."""
    axes = ", ".join(f"{name}: {size}" for name, size in asdict(mesh).items() if size != 1 or name == "data")
    return f"'{{{axes}}}'"
