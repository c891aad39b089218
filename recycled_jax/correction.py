"""Cache correction: keys and values of tokens that were decoded from selections, computed anew with dense attention.

A token that attended to a selection has, from the next layer on, other keys and values than dense decoding would have
given it, and every later token reads them. TidalDecode (arXiv 2410.05076) describes the remedy: now and then the new
tokens run through the model again as a prompt would, on top of the cache before them.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels import prefill_attention
from recycled_jax import rope
from recycled_jax.decode import Params
from recycled_jax.layers import through, weights_of
from recycled_jax.model import Llama, attention_inputs, attention_output, embed, mlp
from recycled_jax.state import DecodeState


def correct(
    model: Llama,
    params: Params,
    state: DecodeState,
    tokens: Int[Array, "batch every"],
    counts: Int[Array, " batch"],
    *,
    implementation: str | None = None,
) -> DecodeState:
    """`state` with the keys and values of each row's last `counts` tokens as dense attention makes them.

    `tokens[:, :counts]` are the ids of those tokens, in slots `lengths - counts` to `lengths - 1`. What stands before
    them in the cache is taken as it is, so each correction takes up where the last one ended. All go through the model
    as one chunk of `every` tokens. What the method keeps besides the cache is left alone: where that holds copies of
    keys and values (a compact buffer), the next step must refresh.

    Raises ValueError for a state whose cache was dropped, and for more tokens than a row of it has slots.
    """
    config, weights, cache = model.config, params["params"], state.cache
    if cache is None:
        raise ValueError("correction needs the full cache, which this policy has dropped")
    every = tokens.shape[1]
    if every > cache.capacity:
        raise ValueError(f"tokens has {every} columns, the cache {cache.capacity} slots per row")
    first = state.lengths - counts
    # A chunk near the end of the cache begins earlier, so that all of it has slots; the columns before `first`, like
    # those after the last token, are computed and thrown away.
    start = jnp.minimum(first, cache.capacity - every)
    slots = start[:, None] + jnp.arange(every, dtype=jnp.int32)[None, :]
    column = slots - first[:, None]
    counted = (column >= 0) & (column < counts[:, None])
    ids = jnp.take_along_axis(tokens, jnp.clip(column, 0, every - 1), axis=1)
    written = jnp.where(counted, slots, cache.capacity)  # past the end: nothing is written
    angles = rope.angles(config, slots)

    def layer_step(carry, layer):
        x, cache = carry
        w = weights_of(weights["layers"], layer)
        q, k, v = attention_inputs(w, config, x)
        q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)

        def append(index, cache):
            return cache.append(layer, written[:, index], k[:, :, index], v[:, :, index])

        cache = lax.fori_loop(0, every, append, cache)
        attended = prefill_attention(q, cache, start, layer=layer, implementation=implementation)
        x = x + attention_output(w, attended)
        x = x + mlp(w, config, x)
        return (x, cache), None

    x = embed(weights, jnp.where(counted, ids, 0), model.dtype)
    (_, cache), _ = through(layer_step, (x, cache), range(config.layers), weights["layers"])
    return DecodeState(cache, state.lengths, state.step, state.kept)


class Uncorrected:
    """Tokens whose keys and values were made since the last correction, of every row, on the host."""

    def __init__(self, next_in: Int[np.ndarray, " batch"], buffer: Int[np.ndarray, "batch every"]):
        self.next_in, self.buffer = np.array(next_in), buffer
        self.counts, self.steps = np.zeros(len(next_in), np.int32), 0

    @property
    def room(self) -> int:
        """Steps until the next correction."""
        return self.buffer.shape[1] - self.steps

    def add(self, tokens: Int[np.ndarray, "steps batch"], steps: Int[np.ndarray, " batch"]) -> None:
        """A block of steps went by, which gave `tokens`, of each row the first `steps`. What went in is the token from
        before it, and all of its tokens but the last."""
        for row, count in enumerate(steps):
            out = [self.next_in[row], *tokens[:count, row]]
            self.buffer[row, self.counts[row] : self.counts[row] + count] = out[:-1]
            self.next_in[row] = out[-1]
            self.counts[row] += count
        self.steps += int(steps.max())

    def take(self) -> tuple[Int[np.ndarray, "batch every"], Int[np.ndarray, " batch"]]:
        """The tokens and how many each row has; from here on they count as corrected."""
        taken = self.buffer.copy(), self.counts
        self.counts, self.steps = np.zeros_like(self.counts), 0
        return taken
