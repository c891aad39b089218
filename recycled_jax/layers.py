"""Going through the layers of a model: weights in a stack are scanned, weights that stand apart are unrolled.

A stack is one program for all layers, however many there are. Where XLA's products copy a layer out of it first, as on
a CPU, a decode step moves three times the bytes of its weights; `for_decoding` takes the stack apart, once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels import PerLayer
from pallas_kernels.dispatch import alone_on_cpu

APART_BYTES = 4 << 20  # of a layer's weights; smaller ones stay in the processor's cache


def for_decoding(params: Mapping) -> Mapping:
    """`params` as decode steps read them fastest: on a CPU, `layers` becomes a tuple with the weights of each.

    That is a copy: where memory is short, drop the stack.
    """
    layers = params["params"]["layers"]
    if not alone_on_cpu() or not isinstance(layers, Mapping):
        return params
    leaves = jax.tree.leaves(layers)
    if sum(leaf.nbytes for leaf in leaves) // leaves[0].shape[0] < APART_BYTES:
        return params
    return {**params, "params": {**params["params"], "layers": _take_apart(layers)}}


@jax.jit
def _take_apart(layers: Mapping) -> tuple[Mapping, ...]:
    [count] = {leaf.shape[0] for leaf in jax.tree.leaves(layers)}
    return tuple(jax.tree.map(lambda stack, layer=layer: stack[layer], layers) for layer in range(count))


def weights_of(layers: Mapping | tuple[Mapping, ...], layer: int | Int[Array, ""]) -> Mapping:
    """The weights of one layer."""
    if isinstance(layers, tuple):
        return layers[layer]
    return jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, layer, keepdims=False), layers)


def through[Carry](
    step: Callable[[Carry, Any], tuple[Carry, Any]], carry: Carry, layers: range, *read: Any
) -> tuple[Carry, Any]:
    """`step(carry, layer)` for each of the layers, as `lax.scan` does it: the last carry, and what they gave, stacked.

    Unrolled, with ints for `layer`, where the layers of a cache or of weights stand apart, in the carry or in `read`.
    """
    leaves = jax.tree.leaves([carry, *read], is_leaf=_stands_apart)  # a list: a tuple would look like weights apart
    if not any(map(_stands_apart, leaves)):
        # over numbers, not over slices of the weights: a slice of the stack would be copied
        return lax.scan(step, carry, jnp.arange(layers.start, layers.stop))
    given = []
    for layer in layers:
        carry, out = step(carry, layer)
        given.append(out)
    return carry, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *given)


def _stands_apart(node: Any) -> bool:
    return isinstance(node, PerLayer) or (type(node) is tuple and len(node) > 0 and isinstance(node[0], Mapping))
