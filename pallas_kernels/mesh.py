"""Where the arrays of operations lie on the mesh in use (`jax.set_mesh`), and operations on every device of it.

Of the mesh's axes `data` and `fsdp` divide rows of the batch, `tensor` heads, `sequence` the slots of a cache.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from pallas_kernels.cache import KVCache, TokenMajor

ROWS, HEADS, SLOTS = ("data", "fsdp"), "tensor", "sequence"
EVERYWHERE = PartitionSpec()


def devices() -> int:
    """How many devices the mesh in use has; 1 without a mesh, and for what each device does on its own."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.manual_axes else mesh.size


def parts() -> int:
    """How many parts the mesh in use divides slots into; 1 as for `devices`."""
    return _sizes().get(SLOTS, 1) if devices() > 1 else 1


def rows_only(x: jax.Array) -> PartitionSpec:
    """[batch, …], or what all share."""
    return PartitionSpec(_rows(x.shape[0])) if x.ndim else EVERYWHERE


def rows_and_heads(x: jax.Array | jax.ShapeDtypeStruct, slots: str | None = None) -> PartitionSpec:
    """[batch, heads, slots, …]; heads that are not divisible, such as one for all, are everywhere."""
    return PartitionSpec(_rows(x.shape[0]), _heads(x.shape[1]), slots)


def spec_of(cache: KVCache, *, slots: str | None = None) -> PartitionSpec:
    """Of each array of a cache whose layers are one stack."""
    rows, heads = _rows(cache.batch), _heads(cache.kv_heads)
    if isinstance(cache, TokenMajor):
        return PartitionSpec(None, rows, slots, None, heads)
    return PartitionSpec(None, rows, heads, slots)


def on_parts(function: Callable[..., Any], arguments: Sequence[Any], specs: Any, out_specs: Any) -> Any:
    """`function` on every device of the mesh in use, with its part of each argument."""
    arrays = jax.tree.map(jnp.asarray, tuple(arguments))
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=out_specs, check_vma=False)(*arrays)


def on_rows_and_heads(
    function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any], *, all_heads: bool = False
) -> Any:
    """`function` on every device, for its rows and heads, as the operations of this package can be divided: arrays are
    [batch, heads, …], [batch] or a number. `all_heads`: what has heads is whole on every device."""
    given = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    rest = {name: value for name, value in options.items() if name not in given}

    def spec(leaf: Any) -> Any:
        if isinstance(leaf, KVCache):
            return spec_of(leaf)
        if leaf.ndim < 2:
            return rows_only(leaf)
        return PartitionSpec(_rows(leaf.shape[0])) if all_heads else rows_and_heads(leaf)

    def specs(tree: Any) -> Any:
        return jax.tree.map(spec, tree, is_leaf=lambda node: isinstance(node, KVCache))

    def on_device(arguments: Sequence[Any], given: Mapping[str, Any]) -> Any:
        return function(*arguments, **given, **rest)

    whole = (jax.tree.map(jnp.asarray, tuple(arguments)), given)
    return on_parts(on_device, whole, specs(whole), specs(jax.eval_shape(on_device, *whole)))


def laid_out[Cache: KVCache](cache: Cache, *, slots: str | None = None) -> Cache:
    """`cache` on the mesh in use."""
    spec = spec_of(cache, slots=slots)
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, spec), cache)


def everywhere[Tree](tree: Tree) -> Tree:
    """Whole on every device of the mesh in use, so that each host can read it."""
    return tree if devices() == 1 else lax.with_sharding_constraint(tree, EVERYWHERE)


def _sizes() -> Mapping[str, int]:
    return jax.sharding.get_abstract_mesh().shape


def _rows(count: int) -> tuple[str, ...] | None:
    axes = tuple(axis for axis in ROWS if axis in _sizes())
    return axes if axes and count % math.prod(_sizes()[axis] for axis in axes) == 0 else None


def _heads(count: int) -> str | None:
    return HEADS if HEADS in _sizes() and count % _sizes()[HEADS] == 0 else None
