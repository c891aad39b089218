"""CCA-Attention in plain numpy, from its paper (arXiv 2412.12465): the prompt is read and decoded by the same rule."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, rotate, softmax


class NumpyCCA(NumpyPolicy):
    """Groups of `group` tokens, each summed up by one core; at least the last `window` tokens one by one.

    `covered[layer]`, one entry per token from the prompt's first: how often every token so far is stood for, by a core
    or by itself. `selected`: those that stand for themselves, one set for all heads. `cores[layer]`: key and value
    [kv_heads, head_dim] per complete group.
    """

    def __init__(self, *, group, window):
        self.group, self.window = group, window
        self.cores: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.covered: dict[int, list[list[int]]] = {}
        self.selected: dict[int, list[list[list[int]]]] = {}

    def prompt_attention(self, layer):
        return self.cores_and_window(layer)

    def attention(self, layer, step):
        out = self.cores_and_window(layer)
        local = range(self.cores_seen(layer.length) * self.group, layer.length)
        self.selected.setdefault(layer.number, []).append([list(local)])
        return out

    def cores_seen(self, i: int) -> int:
        """Cores that the `i`-th token (the first is 1) sees."""
        return max(0, (i - self.window) // self.group)

    def cores_and_window(self, layer: Layer) -> np.ndarray:
        config = layer.config
        self.complete(layer)
        seen = self.cores_seen(layer.length)
        local = range(seen * self.group, layer.length)
        counts = [0] * layer.length
        for core in range(seen):
            for token in range(core * self.group, (core + 1) * self.group):
                counts[token] += 1
        for token in local:
            counts[token] += 1
        self.covered.setdefault(layer.number, []).append(counts)

        out = np.zeros((config.query_heads, config.head_dim))
        for query_head in range(config.query_heads):
            head = query_head // config.group
            entries = [(key[head], value[head]) for key, value in self.cores.get(layer.number, [])[:seen]]
            entries += [(layer.k[token][head], layer.v[token][head]) for token in local]
            q = layer.q[-1][query_head]
            weights = softmax(np.array([q @ key for key, _ in entries]) / np.sqrt(config.head_dim))
            for weight, (_, value) in zip(weights, entries, strict=True):
                out[query_head] += weight * value
        return out

    def complete(self, layer: Layer) -> None:
        """Makes the core of the group whose last token is the present one, if it is one."""
        config, last = layer.config, layer.length - 1
        if layer.length % self.group:
            return
        tokens = range(layer.length - self.group, layer.length)
        bare_key = np.zeros((config.kv_heads, config.head_dim))
        value = np.zeros((config.kv_heads, config.head_dim))
        for head in range(config.kv_heads):
            query_heads = range(head * config.group, (head + 1) * config.group)
            rows = [layer.probabilities(layer.q[last][query_head], query_head, tokens) for query_head in query_heads]
            for weight, token in zip(np.mean(rows, axis=0), tokens, strict=True):
                bare_key[head] += weight * layer.bare_k[token][head]
                value[head] += weight * layer.v[token][head]
        self.cores.setdefault(layer.number, []).append((rotate(config, bare_key, last), value))
