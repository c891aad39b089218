"""TOVA in plain numpy, from its paper (arXiv 2401.06104)."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best


class NumpyTova(NumpyPolicy):
    """One list of tokens per layer, for all heads; between steps at most k - 1, so that with the present token k are
    read. `protect_self`: the token whose query ranks the others is not a candidate."""

    def __init__(self, *, k, protect_self=False):
        self.k, self.protect_self = k, protect_self
        self.held: dict[int, list[int]] = {}
        self.selected: dict[int, list[list[list[int]]]] = {}

    def after_prompt(self, layer):
        self.selected[layer.number] = []
        self.held[layer.number] = self.survivors(layer, list(range(layer.length)))

    def attention(self, layer, step):
        attended = [*self.held[layer.number], layer.length - 1]
        self.selected[layer.number].append([attended] * layer.config.kv_heads)
        self.held[layer.number] = self.survivors(layer, attended)
        return layer.attend(layer.q[-1], [attended] * layer.config.kv_heads)

    def survivors(self, layer: Layer, slots: list[int]) -> list[int]:
        """The k - 1 of `slots` with the highest attention of the newest query, mean over all query heads."""
        if len(slots) <= self.k - 1:
            return slots
        heads = range(layer.config.query_heads)
        mean = np.mean([layer.probabilities(layer.q[-1][head], head, slots) for head in heads], axis=0)
        if self.protect_self:
            mean[-1] = np.inf
        return sorted(slots[place] for place in best(mean.tolist(), self.k - 1))
