"""Tactic in plain numpy, from its paper (arXiv 2502.12216)."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from tests.recycled_jax.policies.kmeans_numpy import lloyd
from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best


class NumpyTactic(NumpyPolicy):
    """`starts(length, clusters)` gives the slots whose keys are the first centroids: the one thing left to chance.

    `k` None: no cap. `overflow[layer]` counts the slots that the cap has dropped, over steps and kv heads.
    """

    def __init__(
        self,
        *,
        p: float,
        starts: Callable[[int, int], Sequence[int]],
        k: int | None = None,
        cluster_size: int = 16,
        iterations: int = 10,
        recluster: int = 2048,
        exact_one_in: int = 64,
        exact_below: int = 256,
    ):
        self.p, self.starts, self.k, self.cluster_size, self.iterations = p, starts, k, cluster_size, iterations
        self.recluster, self.exact_one_in, self.exact_below = recluster, exact_one_in, exact_below
        self.clusters: dict[int, list[tuple[np.ndarray, list[int]]]] = {}  # [layer][kv head]: centroids, labels
        self.selected: dict[int, list[list[list[int]]]] = {}
        self.overflow: dict[int, int] = {}
        self.margin = math.inf  # of the closest decision in any clustering

    def after_prompt(self, layer):
        self.selected[layer.number], self.overflow[layer.number] = [], 0
        self.cluster(layer)

    def cluster(self, layer: Layer) -> None:
        number = max(1, layer.length // self.cluster_size)
        slots = list(self.starts(layer.length, number))
        self.clusters[layer.number] = []
        for head in range(layer.config.kv_heads):
            keys = np.array([key[head] for key in layer.k])
            centroids, labels, margin = lloyd(keys, keys[slots], self.iterations)
            self.clusters[layer.number].append((centroids, labels))
            self.margin = min(self.margin, margin)

    def attention(self, layer, step):
        if step % self.recluster == 0:
            self.cluster(layer)
        present, selected = layer.length - 1, []
        for head in range(layer.config.kv_heads):
            clustered = len(self.clusters[layer.number][head][1])
            group = range(head * layer.config.group, (head + 1) * layer.config.group)
            if layer.length < self.exact_below:
                needed = [self.exact(layer, query_head) for query_head in group]
                always = [present]
            else:
                needed = [self.estimated(layer, query_head) for query_head in group]
                always = [present, *range(present - 1, clustered - 1, -1)]
            least = {slot: min(share[slot] for share in needed) for slot in needed[0]}
            kept = [slot for slot in least if least[slot] < self.p or self.p == 1]
            # the cap's order: the present token, the newest of the unclustered, then the union for a smaller p
            by_share = sorted(kept, key=lambda slot: (least[slot], slot))
            union = always + [slot for slot in by_share if slot not in always]
            selected.append(sorted(union[: self.k]))
            self.overflow[layer.number] += len(union) - len(selected[-1])
        self.selected[layer.number].append(selected)
        return layer.attend(layer.q[-1], selected)

    def exact(self, layer: Layer, query_head: int) -> dict[int, float]:
        """Of each slot, the probability of those that come before it when the likeliest come first."""
        row = layer.probabilities(layer.q[-1][query_head], query_head, range(layer.length))
        return shares_before(best(row.tolist(), layer.length), sorted(row, reverse=True))

    def estimated(self, layer: Layer, query_head: int) -> dict[int, float]:
        """The same of each clustered slot, by the estimate and in the order of the clusters."""
        q = layer.q[-1][query_head]
        centroids, labels = self.clusters[layer.number][query_head // layer.config.group]
        # a cluster without members may come anywhere: it has no slots to rank
        order = []
        for number in best([centroid @ q for centroid in centroids], len(centroids)):
            order += [slot for slot, label in enumerate(labels) if label == number]
        return shares_before(order, self.estimate(layer.logits(q, query_head, order)))

    def estimate(self, logits: np.ndarray) -> list[float]:
        """Weights by rank: exact for the first ranks, a/x + b fitted to two windows for the rest.

        Reads no logit outside the first ranks and the windows.
        """
        total = len(logits)
        first = range(1, math.ceil(total / self.exact_one_in) + 1)
        near, far = window(total // 10, total), window(total * 6 // 10, total)
        shift = max(logits[x - 1] for x in [*first, *near, *far])
        weight = {x: math.exp(logits[x - 1] - shift) for x in [*first, *near, *far]}
        x1, x2 = np.mean(near), np.mean(far)
        y1, y2 = np.mean([weight[x] for x in near]), np.mean([weight[x] for x in far])
        slope = max((y1 - y2) / (1 / x1 - 1 / x2), 0) if x1 != x2 else 0
        floor = max(y1 - slope / x1, 0)
        return [weight[x] if x in first else slope / x + floor for x in range(1, total + 1)]


def shares_before(order: Sequence[int], weights: Sequence[float]) -> dict[int, float]:
    """Of each slot, which share of the sum of all weights those before it have."""
    return {slot: sum(weights[:place]) / sum(weights) for place, slot in enumerate(order)}


def window(middle: int, total: int) -> range:
    """Half a percent of the ranks 1..total, around one of them."""
    width = math.ceil(total / 200)
    first = max(1, middle - (width - 1) // 2)
    return range(first, min(first + width - 1, total) + 1)
