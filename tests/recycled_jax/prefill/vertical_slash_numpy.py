"""MInference's vertical-slash pattern in plain numpy, from its paper (arXiv 2407.02490)."""

from tests.recycled_jax.policies.numpy_llama import Layer, best
from tests.recycled_jax.prefill.numpy_prefill import NumpyPrefill


class NumpyVerticalSlash(NumpyPrefill):
    """Every query head: `columns` slots for all queries, the first `sinks` among them, and `slashes` distances back,
    the nearest `recent` among them; chosen by the attention of the last `window` queries, those of the prompt or, if it
    is read in chunks, those of each."""

    def __init__(self, *, columns, slashes, window, sinks, recent, chunk=None):
        super().__init__()
        self.columns, self.slashes, self.window = columns, slashes, window
        self.sinks, self.recent, self.chunk = sinks, recent, chunk

    def sees(self, layer: Layer) -> list[list[list[int]]]:
        sees = []
        chunk = self.chunk or layer.length
        for query_head in range(layer.config.query_heads):
            rows = []
            for start in range(0, layer.length, chunk):
                tokens = range(start, min(start + chunk, layer.length))
                columns, distances = self.pattern(layer, query_head, tokens)
                rows += [[u for u in range(t + 1) if u in columns or t - u in distances] for t in tokens]
            sees.append(rows)
        return sees

    def pattern(self, layer: Layer, query_head: int, tokens: range) -> tuple[set[int], set[int]]:
        column_mass, distance_mass = [0.0] * tokens.stop, [0.0] * tokens.stop
        for t in tokens[-self.window :]:
            for u, p in enumerate(layer.probabilities(layer.q[t][query_head], query_head, range(t + 1))):
                column_mass[u] += p
                distance_mass[t - u] += p
        return forced(column_mass, self.columns, self.sinks), forced(distance_mass, self.slashes, self.recent)


def forced(mass: list[float], count: int, first: int) -> set[int]:
    """The `first` places, then the heaviest, `count` in all."""
    always = list(range(len(mass)))[: min(first, count)]
    return {*always, *[place for place in best(mass, len(mass)) if place not in always][: count - len(always)]}
