"""LessIsMore in plain numpy, from its paper (arXiv 2508.07101): TidalDecode's layers, another choice."""

from tests.recycled_jax.policies.numpy_llama import Layer, best
from tests.recycled_jax.policies.tidal_numpy import NumpyTidal, regions


class NumpyLessIsMore(NumpyTidal):
    """One set for all heads: first choices of all query heads, then second choices, and so on, without duplicates. The
    sinks are taken from the recent window's share, of which at least the present token is left."""

    def __init__(self, *, k, selection_layers, dense_layers=(0, 1), recent_ratio=0.25, sinks=4, output="full"):
        recent = max(1, round(recent_ratio * k) - sinks)
        super().__init__(
            k=k,
            selection_layers=selection_layers,
            dense_layers=dense_layers,
            heads="all",
            sinks=sinks,
            recent=recent,
            output=output,
        )

    def weakest_first(self, layer):
        slots = union_weakest_first(layer, self.k, self.sinks, self.recent)
        return [slots] * layer.config.kv_heads


def union_weakest_first(layer: Layer, k: int, sinks: int, recent: int) -> list[int]:
    """By order of choice, last first; then the recent window from its oldest token, then the sinks."""
    first_slots, middle, window = regions(layer.length, sinks, recent)
    count = k - sinks - recent
    choices = []  # per query head, strongest first
    for query_head in range(layer.config.query_heads):
        scores = layer.logits(layer.q[-1][query_head], query_head, middle)
        choices.append([middle[place] for place in best(list(scores), count)])
    union: list[int] = []
    for rank in range(min(count, len(middle))):
        for of_head in choices:
            if of_head[rank] not in union and len(union) < count:
                union.append(of_head[rank])
    return [*reversed(union), *window, *first_slots]
