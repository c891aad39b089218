"""Random slots in plain numpy: self, the sinks, and a uniform draw without replacement of the rest."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from tests.recycled_jax.policies.numpy_llama import NumpyPolicy, best


class NumpyRandomSlots(NumpyPolicy):
    """`draws(layer, kv_head, step)` gives every slot an independent random number; the largest are drawn. Frozen, each
    slot keeps its number of step 0."""

    def __init__(self, *, k, draws: Callable[[int, int, int], Sequence[float]], sinks=0, frozen=False):
        self.k, self.draws, self.sinks, self.frozen = k, draws, sinks, frozen
        self.selected = defaultdict(list)

    def attention(self, layer, step):
        self_slot = layer.length - 1
        sinks = list(range(min(self.sinks, self_slot)))
        chosen = []
        for head in range(layer.config.kv_heads):
            numbers = self.draws(layer.number, head, 0 if self.frozen else step)
            others = range(len(sinks), self_slot)
            drawn = best([numbers[slot] for slot in others], self.k - 1 - len(sinks))
            chosen.append(sorted([*sinks, *(others[place] for place in drawn), self_slot]))
        self.selected[layer.number].append(chosen)
        return layer.attend(layer.q[-1], chosen)
