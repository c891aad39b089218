"""TidalDecode in plain numpy, from its paper (arXiv 2410.05076)."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best


class NumpyTidal(NumpyPolicy):
    """Selection layers choose anew at every step, the layers above them follow. `heads`: "kv", a set for each kv head,
    or "all", one set, which `selected` tells once. `recent` counts the present token. `output`: what a selection layer
    attends, "full" or the "selection". `correct_every`: after so many steps their tokens run through the model again,
    densely."""

    def __init__(
        self,
        *,
        k,
        selection_layers,
        dense_layers=(0, 1),
        group_reduction="max",
        heads="kv",
        pool=1,
        sinks=0,
        recent=1,
        output="full",
        correct_every=None,
    ):
        self.k, self.selection_layers, self.dense_layers = k, selection_layers, dense_layers
        self.group_reduction, self.heads, self.pool = group_reduction, heads, pool
        self.sinks, self.recent = sinks, recent
        self.output, self.correct_every = output, correct_every
        self.choice: list[list[int]] = []  # of the nearest selection layer so far: slots per kv head
        self.selected: dict[int, list[list[list[int]]]] = {}

    def attention(self, layer, step):
        if layer.number in self.dense_layers:
            return layer.attend(layer.q[-1], layer.everything())
        if layer.number in self.selection_layers:
            self.choice = self.weakest_first(layer)
        told = self.choice[:1] if self.heads == "all" else self.choice
        self.selected.setdefault(layer.number, []).append([sorted(slots) for slots in told])
        if layer.number in self.selection_layers and self.output == "full":
            return layer.attend(layer.q[-1], layer.everything())
        return layer.attend(layer.q[-1], self.choice)

    def after_step(self, llama, step):
        if self.correct_every is not None and step % self.correct_every == 0:
            correct(llama, self.correct_every)

    def weakest_first(self, layer: Layer) -> list[list[int]]:
        """The set of each kv head: by score, then the recent window from its oldest token, then the sinks."""
        sinks, middle, recent = regions(layer.length, self.sinks, self.recent)
        rows = [
            layer.probabilities(layer.q[-1][query_head], query_head, range(layer.length))
            for query_head in range(layer.config.query_heads)
        ]
        sets = []
        for head in range(layer.config.kv_heads):
            group = layer.config.group
            mine = rows if self.heads == "all" else rows[head * group : (head + 1) * group]
            scores = [reduce(self.group_reduction, [row[slot] for row in mine]) for slot in middle]
            reach = self.pool // 2
            pooled = [max(scores[max(0, place - reach) : place + reach + 1]) for place in range(len(scores))]
            strongest = best(pooled, self.k - self.sinks - self.recent)
            sets.append([*[middle[place] for place in reversed(strongest)], *recent, *sinks])
        return sets


def regions(length: int, sinks: int, recent: int) -> tuple[list[int], list[int], list[int]]:
    """The slots of the sinks, those between, and the recent window; the sinks come first where both would overlap."""
    start = min(sinks, length)
    window = max(length - recent, start)
    return list(range(start)), list(range(start, window)), list(range(window, length))


def reduce(name: str, values: list[float]) -> float:
    return {"max": max(values), "mean": float(np.mean(values)), "sum": float(np.sum(values))}[name]


def correct(llama, count: int) -> None:
    """The last `count` tokens once more through the model, as if they had been part of the prompt."""
    tokens = llama.tokens[-count:]
    del llama.tokens[-count:]
    for layer in llama.layers:
        for held in (layer.k, layer.v, layer.q, layer.bare_q, layer.bare_k):
            del held[-count:]
    for token in tokens:
        llama.forward(token, 0)
