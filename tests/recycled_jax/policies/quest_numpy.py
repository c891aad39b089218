"""Quest in plain numpy, from its paper (arXiv 2406.10774): pages ranked by an upper bound of their keys' products."""

from collections import defaultdict

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best
from tests.recycled_jax.policies.top_k_numpy import REDUCTIONS


class NumpyQuest(NumpyPolicy):
    def __init__(self, *, k, page=16, group_reduction="sum", dense_layers=(0, 1)):
        self.pages, self.page = k // page, page
        self.group_reduction, self.dense_layers = group_reduction, dense_layers
        self.selected = defaultdict(list)

    def attention(self, layer, step):
        if layer.number in self.dense_layers:
            return layer.attend(layer.q[-1], layer.everything())
        pages = [range(start, min(start + self.page, layer.length)) for start in range(0, layer.length, self.page)]
        chosen = []
        for head in range(layer.config.kv_heads):
            group = range(head * layer.config.group, (head + 1) * layer.config.group)
            bounds = [
                REDUCTIONS[self.group_reduction](
                    [bound(layer, layer.q[-1][query_head], head, page) for query_head in group]
                )
                for page in pages[:-1]  # the open page is always read
            ]
            kept = [pages[place] for place in best(bounds, self.pages - 1)] + [pages[-1]]
            chosen.append(sorted(slot for page in kept for slot in page))
        self.selected[layer.number].append(chosen)
        return layer.attend(layer.q[-1], chosen)


def bound(layer: Layer, q: np.ndarray, head: int, page: range) -> float:
    """No key between the smallest and the largest of the page, channel by channel, has a larger product with `q`."""
    keys = np.array([layer.k[slot][head] for slot in page])
    total = 0.0
    for channel, value in enumerate(q):
        total += max(value * keys[:, channel].min(), value * keys[:, channel].max())
    return total
