"""TokenSelect's chunked prefill in plain numpy, from its paper (arXiv 2411.02886)."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, best, softmax
from tests.recycled_jax.prefill.numpy_prefill import NumpyPrefill


class NumpyTokenSelect(NumpyPrefill):
    """Every `chunk` of queries reads the `sinks`, the `recent` slots up to its end, and the slots between on which the
    heads vote with their mean query: one set for all heads, `k` in all."""

    def __init__(self, *, k, sinks, recent, chunk, pool=1, vote_scale=1.0):
        super().__init__()
        self.k, self.sinks, self.recent, self.chunk = k, sinks, recent, chunk
        self.pool, self.vote_scale = pool, vote_scale

    def sees(self, layer: Layer) -> list[list[list[int]]]:
        sees = super().sees(layer)
        for start in range(0, layer.length, self.chunk):
            end = min(start + self.chunk, layer.length)
            if self.k >= end:
                continue
            middle = range(self.sinks, end - self.recent)
            votes = self.votes(layer, range(start, end), middle)
            reach = self.pool // 2
            pooled = [max(votes[max(0, m - reach) : m + reach + 1]) for m in range(len(votes))]
            chosen = [middle[m] for m in best(pooled, self.k - self.sinks - self.recent)]
            kept = {*range(self.sinks), *chosen, *range(end - self.recent, end)}
            for row in sees:
                for token in range(start, end):
                    row[token] = [slot for slot in row[token] if slot in kept]
        return sees

    def votes(self, layer: Layer, tokens: range, middle: range) -> list[float]:
        total = np.zeros(len(middle))
        for query_head in range(layer.config.query_heads):
            q = np.mean([layer.q[token][query_head] for token in tokens], axis=0)
            keys = np.array([layer.k[slot][query_head // layer.config.group] for slot in middle])
            total += softmax(keys @ q * self.vote_scale)
        return list(total)
