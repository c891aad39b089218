"""Logical axes of weights and activations, and the one table that lays them on a device mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recycled_jax.config import LlamaConfig
from recycled_jax.weights import map_weights

# logical axis → mesh axes (none, or absent from the mesh: replicated)
RULES: dict[str, tuple[str, ...]] = {
    # weights
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "query_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    # activations
    "batch": ("data", "fsdp"),
    "one_row": (),
    "tokens": ("sequence",),
    "all_tokens": (),
    "features": (),
    "attention_heads": ("tensor", "sequence"),
}


def partition_spec(axes: Sequence[str], mesh: Mesh) -> PartitionSpec:
    """The mesh axes of an array whose dimensions are the logical `axes`.

    Raises ValueError for an unknown logical axis and for a mesh axis that two dimensions would share.
    """
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis in axes:
        if axis not in RULES:
            raise ValueError(f"logical axis {axis!r} has no rule, expected one of {', '.join(RULES)}")
        present = tuple(name for name in RULES[axis] if name in mesh.axis_names)
        if used & set(present):
            raise ValueError(f"axes={tuple(axes)} would use mesh axis {sorted(used & set(present))} twice")
        used |= set(present)
        entries.append(present[0] if len(present) == 1 else present or None)
    return PartitionSpec(*entries)


def named_sharding(axes: Sequence[str], mesh: Mesh) -> NamedSharding:
    """The placement of an array whose dimensions are the logical `axes`. Raises as `partition_spec`.

    The axes of `mesh` count as automatic, which those of `jax.make_mesh` are not: the model states where parameters
    lie and leaves the rest to the compiler.
    """
    return NamedSharding(automatic(mesh), partition_spec(axes, mesh))


def automatic(mesh: Mesh) -> Mesh:
    """The same devices and names, every axis the compiler's to use."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def param_shardings(config: LlamaConfig, mesh: Mesh) -> dict:
    """A `NamedSharding` for every parameter, in the shape of the parameter tree."""
    return map_weights(
        config,
        lambda weight: named_sharding(weight.axes, mesh),
        lambda weight: named_sharding(("layers", *weight.axes), mesh),
    )


def constrain(x: jax.Array, axes: Sequence[str], mesh: Mesh | None) -> jax.Array:
    """`x`, whose dimensions are the logical `axes`, laid out on `mesh` if there is one. Raises as `partition_spec`."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, named_sharding(axes, mesh))


def on_its_mesh[**Arguments, Given](function: Callable[Arguments, Given]) -> Callable[Arguments, Given]:
    """`function(model, ...)` with the model's mesh, if it has one, as the mesh in use."""

    @functools.wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Given:
        model: Any = args[0]
        if model.mesh is None:
            return function(*args, **kwargs)
        with jax.set_mesh(automatic(model.mesh)):
            return function(*args, **kwargs)

    return wrapped
