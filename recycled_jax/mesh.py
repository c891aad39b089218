"""Device meshes: how many devices along each axis, and whether a model can lie on them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from recycled_jax.config import LlamaConfig
from recycled_jax.spelling import nearest


@dataclass(frozen=True)
class MeshSizes:
    """Devices along each mesh axis; -1 takes all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor, self.sequence)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh={asdict(self)} must have sizes of at least 1, or -1 in one place")


def mesh_sizes(sizes: Mapping[str, int]) -> MeshSizes:
    """Sizes as a command line gives them. Raises ValueError for an axis that there is not, and as `MeshSizes`."""
    axes = [field.name for field in fields(MeshSizes)]
    for axis in sizes:
        if axis not in axes:
            raise ValueError(f"mesh has the axis {axis!r}; {nearest(axis, axes)}")
    return MeshSizes(**sizes)


def make_mesh(sizes: MeshSizes, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (of this program, if not given), neighbours beside each other; one axis may be -1. Raises
    ValueError when the sizes do not divide the devices."""
    shape, devices = asdict(sizes), devices or jax.devices()
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if len(devices) % fixed:
        raise ValueError(f"mesh={shape} needs a multiple of {fixed} devices, there are {len(devices)}")
    resolved = [len(devices) // fixed if size == -1 else size for size in shape.values()]
    if int(np.prod(resolved)) != len(devices):
        raise ValueError(f"mesh={shape} covers {int(np.prod(resolved))} devices, there are {len(devices)}")
    # an axis may be part of one of the torus: tensor 2 of 4 x 4 x 4
    laid = mesh_utils.create_device_mesh(resolved, devices, allow_split_physical_axes=True)
    return Mesh(laid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def rows_together(mesh: Mesh) -> int:
    """What the number of rows of a batch has to be a multiple of."""
    return math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))


def check_decoding(config: LlamaConfig, mesh: Mesh, *, batch: int) -> None:
    """Raises ValueError where the mesh divides what cannot be divided: rows of the batch, kv heads, MLP, vocabulary."""
    rows, tensor = rows_together(mesh), mesh.shape.get("tensor", 1)
    if batch % rows:
        raise ValueError(f"mesh has data x fsdp = {rows}, expected a divisor of the {batch} rows of the batch")
    for name in ("kv_heads", "mlp", "vocab"):
        if getattr(config, name) % tensor:
            raise ValueError(f"mesh has {tensor=}, expected a divisor of {name}={getattr(config, name)}")
