"""H2O in plain numpy, from its paper (arXiv 2306.14048)."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best


class NumpyH2O(NumpyPolicy):
    """Per kv head: the tokens still held, and the attention that each has received since it came.

    Between steps at most k - 1 are held, the `recent` newest and those that have received most, so that with the
    present token k are read. `accumulation` "normalised" ranks by the mean over the queries that saw the token.
    """

    def __init__(self, *, k, recent=None, accumulation="original", group_reduction="max"):
        self.k, self.recent = k, k // 2 if recent is None else recent
        self.accumulation, self.group_reduction = accumulation, group_reduction
        self.held: dict[int, list[list[int]]] = {}
        self.received: dict[int, list[dict[int, float]]] = {}
        self.selected: dict[int, list[list[list[int]]]] = {}

    def after_prompt(self, layer):
        heads = range(layer.config.kv_heads)
        self.selected[layer.number] = []
        self.held[layer.number] = [list(range(layer.length)) for _ in heads]
        self.received[layer.number] = [dict.fromkeys(range(layer.length), 0.0) for _ in heads]
        for head in heads:
            for query in range(layer.length):
                self.accumulate(layer, head, layer.q[query], list(range(query + 1)))
            self.evict(layer, head)

    def attention(self, layer, step):
        present = layer.length - 1
        for head in range(layer.config.kv_heads):
            self.held[layer.number][head].append(present)
            self.received[layer.number][head][present] = 0.0
        attended = [list(slots) for slots in self.held[layer.number]]
        self.selected[layer.number].append(attended)
        for head in range(layer.config.kv_heads):
            self.accumulate(layer, head, layer.q[-1], attended[head])
            self.evict(layer, head)
        return layer.attend(layer.q[-1], attended)

    def accumulate(self, layer: Layer, head: int, q: np.ndarray, slots: list[int]) -> None:
        group = layer.config.group
        rows = [layer.probabilities(q[h], h, slots) for h in range(head * group, (head + 1) * group)]
        reduced = {"max": np.max, "mean": np.mean, "sum": np.sum}[self.group_reduction](rows, axis=0)
        for slot, mass in zip(slots, reduced, strict=True):
            self.received[layer.number][head][slot] += mass

    def evict(self, layer: Layer, head: int) -> None:
        held = self.held[layer.number][head]
        if len(held) <= self.k - 1:
            return
        older, newest = held[: len(held) - self.recent], held[len(held) - self.recent :]
        mass = self.received[layer.number][head]
        if self.accumulation == "normalised":
            scores = [mass[slot] / (layer.length - slot) for slot in older]  # as many queries saw it
        else:
            scores = [mass[slot] for slot in older]
        heavy = sorted(older[place] for place in best(scores, self.k - 1 - self.recent))
        self.held[layer.number][head] = heavy + newest
