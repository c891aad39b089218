"""SnapKV in plain numpy, from its paper (arXiv 2404.14469)."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best


class NumpySnapKV(NumpyPolicy):
    """Per kv head: the k tokens that the last `window` prompt tokens look at most, those included, chosen once.

    `tail` None: every generated token is read as well. Otherwise a list of so many empty entries, then the chosen ones,
    weakest first, then the window, oldest first; each new token takes the place of the next in that order, and after
    the last of the first.
    """

    def __init__(self, *, k, window=32, pool=5, pooling="avg", tail=None, group_reduction="max"):
        self.k, self.window, self.pool, self.pooling = k, window, pool, pooling
        self.tail, self.group_reduction = tail, group_reduction
        self.entries: dict[int, list[list[int | None]]] = {}
        self.selected: dict[int, list[list[list[int]]]] = {}

    def after_prompt(self, layer):
        self.selected[layer.number] = []
        self.entries[layer.number] = [self.choose(layer, head) for head in range(layer.config.kv_heads)]

    def attention(self, layer, step):
        for entries in self.entries[layer.number]:
            if self.tail is None:
                entries.append(layer.length - 1)
            else:
                entries[(step - 1) % len(entries)] = layer.length - 1
        attended = [sorted(slot for slot in entries if slot is not None) for entries in self.entries[layer.number]]
        self.selected[layer.number].append(attended)
        return layer.attend(layer.q[-1], attended)

    def choose(self, layer: Layer, head: int) -> list[int | None]:
        window = list(range(max(0, layer.length - self.window), layer.length))
        candidates = window[0]
        group = layer.config.group
        sums = [
            np.sum(
                [layer.probabilities(layer.q[t][h], h, range(t + 1))[:candidates] for t in window],
                axis=0,
            )
            for h in range(head * group, (head + 1) * group)
        ]
        scores = self.smooth({"max": np.max, "mean": np.mean, "sum": np.sum}[self.group_reduction](sums, axis=0))
        weakest_first = best(scores, self.k - self.window)[::-1]
        empty = (self.tail or 0) + self.k - len(weakest_first) - len(window)
        return [None] * empty + weakest_first + window

    def smooth(self, scores: np.ndarray) -> list[float]:
        """`scores` pooled over the candidates: the maximum, the mean of those there are, or (the released code) the sum
        of those there are over the width."""
        reach = self.pool // 2
        pooled = []
        for place in range(len(scores)):
            near = scores[max(0, place - reach) : place + reach + 1]
            pooled.append({"max": near.max(), "avg": near.mean(), "avg_padded": near.sum() / self.pool}[self.pooling])
        return pooled
