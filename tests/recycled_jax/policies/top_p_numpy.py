"""Exact top-p at every step in plain numpy: the fewest slots that hold a share p of every query head's attention."""

from collections import defaultdict

import numpy as np

from tests.recycled_jax.policies.numpy_llama import NumpyPolicy, best


class NumpyTopP(NumpyPolicy):
    """Where the union of a group does not fit into `k` slots, it is that of a smaller p, cut among equals to the
    earlier slots. `overflow[layer]`: how many slots that has left out, over steps and kv heads."""

    def __init__(self, *, p, k):
        self.p, self.k = p, k
        self.overflow = defaultdict(int)
        self.selected = defaultdict(list)

    def attention(self, layer, step):
        chosen = []
        for head in range(layer.config.kv_heads):
            group = range(head * layer.config.group, (head + 1) * layer.config.group)
            rows = [
                mass_before(layer.probabilities(layer.q[-1][query_head], query_head, range(layer.length)))
                for query_head in group
            ]
            needed = np.min(rows, axis=0).tolist()  # the slot is in the union of every p above this
            past = [slot for slot in range(layer.length - 1) if needed[slot] < self.p or self.p == 1]
            if len(past) > self.k - 1:
                self.overflow[layer.number] += len(past) - (self.k - 1)
                past = sorted(past, key=lambda slot: (needed[slot], slot))[: self.k - 1]
            chosen.append([*sorted(past), layer.length - 1])
        self.selected[layer.number].append(chosen)
        return layer.attend(layer.q[-1], chosen)


def mass_before(row: np.ndarray) -> list[float]:
    """What the places with more than each one hold together: it is among the fewest that reach p if this is below p."""
    before, held = [0.0] * len(row), 0.0
    for place in best(row.tolist(), len(row)):
        before[place] = held
        held += row[place]
    return before
