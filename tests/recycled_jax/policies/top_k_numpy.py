"""Exact top-k at every step in plain numpy: attention probabilities, reduced over groups; the best k - 1 and self."""

from collections import defaultdict

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best

REDUCTIONS = {"max": np.max, "mean": np.mean, "sum": np.sum}


class NumpyTopK(NumpyPolicy):
    def __init__(self, *, k, pool=1, group_reduction="max"):
        self.k, self.pool, self.group_reduction = k, pool, group_reduction
        self.selected = defaultdict(list)

    def attention(self, layer, step):
        chosen = []
        for head in range(layer.config.kv_heads):
            past = ranked_past(layer, head, self.pool, self.group_reduction, present=layer.length - 1)
            chosen.append(sorted([*past[: self.k - 1], layer.length - 1]))
        self.selected[layer.number].append(chosen)
        return layer.attend(layer.q[-1], chosen)


def ranked_past(layer: Layer, head: int, pool: int, group_reduction: str, present: int) -> list[int]:
    """The slots before the token `present`, the most attended by it first."""
    past = reduced_row(layer, head, group_reduction, present)[
        :-1
    ]  # the present token is forced: no candidate, and not pooled
    reach = pool // 2
    pooled = [past[max(0, slot - reach) : slot + reach + 1].max() for slot in range(len(past))]
    return best(pooled, len(past))


def reduced_row(layer: Layer, head: int, group_reduction: str, present: int) -> np.ndarray:
    """Attention probabilities of that token over all slots so far, reduced over the query heads of a kv head."""
    group = layer.config.group
    rows = [
        layer.probabilities(layer.q[present][query_head], query_head, range(present + 1))
        for query_head in range(head * group, (head + 1) * group)
    ]
    return REDUCTIONS[group_reduction](rows, axis=0)
