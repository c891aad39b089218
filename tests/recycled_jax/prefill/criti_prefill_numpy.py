"""CritiPrefill in plain numpy, from its paper (arXiv 2409.12490)."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, best, softmax
from tests.recycled_jax.prefill.numpy_prefill import NumpyPrefill


class NumpyCritiPrefill(NumpyPrefill):
    """Segments of `segment` queries read themselves and the best `k` slots before them, in blocks of `block`. Dense:
    layer 0, segments that start before `threshold`, and the last one."""

    def __init__(self, *, k, segment, block, threshold, fusion):
        super().__init__()
        self.k, self.segment, self.block, self.threshold, self.fusion = k, segment, block, threshold, fusion
        self.maps: dict[int, dict[tuple[int, int], np.ndarray]] = {}  # [layer][kv head, segment] of [block]

    def sees(self, layer: Layer) -> list[list[list[int]]]:
        sees = super().sees(layer)
        if layer.number == 0:
            return sees
        maps = self.maps[layer.number] = {}
        last = (layer.length - 1) // self.segment
        for number in range(1, last):
            start = number * self.segment
            for head in range(layer.config.kv_heads):
                row = self.scores(layer, number, head)
                if layer.number > 1:
                    row = self.fusion * self.maps[layer.number - 1][head, number] + (1 - self.fusion) * row
                maps[head, number] = row
                if start < self.threshold:
                    continue
                blocks = best(list(row), self.k // self.block)
                past = [slot for slot in range(start) if slot // self.block in blocks]
                for query_head in range(head * layer.config.group, (head + 1) * layer.config.group):
                    for token in range(start, start + self.segment):
                        sees[query_head][token] = past + list(range(start, token + 1))
        return sees

    def scores(self, layer: Layer, number: int, head: int) -> np.ndarray:
        """How critical the blocks before a segment are to a kv head."""
        segment = range(number * self.segment, (number + 1) * self.segment)
        per_query_head = []
        for query_head in range(head * layer.config.group, (head + 1) * layer.config.group):
            q = np.array([layer.q[token][query_head] for token in segment])
            high, low = q.max(axis=0), q.min(axis=0)
            row = []
            for first in range(0, segment.start, self.block):
                k = np.array([layer.k[slot][head] for slot in range(first, first + self.block)])
                top, bottom = k.max(axis=0), k.min(axis=0)
                row.append(max((high @ top + low @ top) / 2, (high @ bottom + low @ bottom) / 2))
            per_query_head.append(row)
        return softmax(np.mean(per_query_head, axis=0))
