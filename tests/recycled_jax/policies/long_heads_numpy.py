"""LongHeads in plain numpy, from its paper (arXiv 2402.10685): keys are gathered and rotated anew for every query."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best, rotate, softmax


class NumpyLongHeads(NumpyPolicy):
    """Every query attends at most `k` tokens, whole chunks of `chunk`, laid out next to each other; up to `begin`
    tokens attention is dense."""

    def __init__(self, *, k, chunk, begin=None):
        self.places, self.chunk, self.begin = k // chunk, chunk, k if begin is None else begin
        self.summaries: dict[int, list[np.ndarray]] = {}  # [layer][chunk] of [query_heads, head_dim]
        self.selected: dict[int, list[list[list[int]]]] = {}

    def prompt_attention(self, layer):
        return self.attend(layer, self.chosen(layer))

    def attention(self, layer, step):
        chunks = self.chosen(layer)
        slots = [[slot for chunk in row for slot in self.slots(layer, chunk)] for row in chunks]
        self.selected.setdefault(layer.number, []).append(slots)
        return self.attend(layer, chunks)

    def chosen(self, layer: Layer) -> list[list[int]]:
        """The chunks that the newest token reads, ascending, per kv head."""
        config = layer.config
        summaries = self.summaries.setdefault(layer.number, [])
        if layer.length % self.chunk == 0:
            summaries.append(self.summary(layer, layer.length // self.chunk - 1))
        current = (layer.length - 1) // self.chunk
        if layer.length <= self.begin or current + 1 <= self.places:
            return [list(range(current + 1))] * config.kv_heads
        rows = []
        for head in range(config.kv_heads):
            queries = range(head * config.group, (head + 1) * config.group)
            candidates = list(range(1, current - 1))
            scores = [max(layer.bare_q[-1][h] @ summaries[c][h] for h in queries) for c in candidates]
            free = [candidates[place] for place in best(scores, self.places - 3)]
            rows.append(sorted([0, *free, current - 1, current]))
        return rows

    def summary(self, layer: Layer, chunk: int) -> np.ndarray:
        """A complete chunk in the place of keys, for every query head."""
        config = layer.config
        slots = range(chunk * self.chunk, (chunk + 1) * self.chunk)
        q = [rotate(config, layer.bare_q[slot], slot % self.chunk) for slot in slots]
        k = [rotate(config, layer.bare_k[slot], slot % self.chunk) for slot in slots]
        rows = []
        for h in range(config.query_heads):
            keys = np.array([key[h // config.group] for key in k])
            values = np.array([layer.v[slot][h // config.group] for slot in slots])
            outputs = [softmax(keys @ query[h] / np.sqrt(config.head_dim)) @ values for query in q]
            rows.append(softmax(keys @ np.mean(outputs, axis=0) / np.sqrt(config.head_dim)) @ keys)
        return np.array(rows)

    def slots(self, layer: Layer, chunk: int) -> list[int]:
        return list(range(chunk * self.chunk, min((chunk + 1) * self.chunk, layer.length)))

    def attend(self, layer: Layer, chunks_of_heads: list[list[int]]) -> np.ndarray:
        """Attention of the newest token, its chunks remapped to lie next to each other."""
        config = layer.config
        out = np.zeros((config.query_heads, config.head_dim))
        for head, chunks in enumerate(chunks_of_heads):
            keys, values = [], []
            for place, chunk in enumerate(chunks):
                for slot in self.slots(layer, chunk):
                    position = place * self.chunk + slot % self.chunk
                    keys.append(rotate(config, layer.bare_k[slot], position)[head])
                    values.append(layer.v[slot][head])
            own = (len(chunks) - 1) * self.chunk + (layer.length - 1) % self.chunk
            q = rotate(config, layer.bare_q[-1], own)
            for h in range(head * config.group, (head + 1) * config.group):
                out[h] = softmax(np.array(keys) @ q[h] / np.sqrt(config.head_dim)) @ np.array(values)
        return out
