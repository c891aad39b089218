"""StreamingLLM in plain numpy, from its paper (arXiv 2309.17453)."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import NumpyPolicy, rotate, softmax


class NumpyStreaming(NumpyPolicy):
    """The first `sinks` tokens and the newest `k - sinks`, the present one among them.

    `positions` "shifted" is the paper's cache: keys without rotation, each turned to its place in the cache when it is
    read, and the query to the last place.
    """

    def __init__(self, *, k, sinks=4, positions="true"):
        self.k, self.sinks, self.positions = k, sinks, positions
        self.selected: dict[int, list[list[list[int]]]] = {}

    def attention(self, layer, step):
        slots = [t for t in range(layer.length) if t < self.sinks or t >= layer.length - (self.k - self.sinks)]
        self.selected.setdefault(layer.number, []).append([slots] * layer.config.kv_heads)
        if self.positions == "true":
            return layer.attend(layer.q[-1], [slots] * layer.config.kv_heads)
        q = rotate(layer.config, layer.bare_q[-1], len(slots) - 1)
        keys = [rotate(layer.config, layer.bare_k[slot], place) for place, slot in enumerate(slots)]
        out = np.zeros_like(q)
        for query_head in range(layer.config.query_heads):
            head = query_head // layer.config.group
            logits = [key[head] @ q[query_head] / np.sqrt(layer.config.head_dim) for key in keys]
            weights = softmax(np.array(logits))
            for weight, slot in zip(weights, slots, strict=True):
                out[query_head] += weight * layer.v[slot][head]
        return out
