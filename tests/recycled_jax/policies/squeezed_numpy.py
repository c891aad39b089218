"""Squeezed Attention in plain numpy, from its paper (arXiv 2411.09688). The prompt is the fixed prefix."""

import math
from collections.abc import Sequence

import numpy as np

from tests.recycled_jax.policies.kmeans_numpy import lloyd, spread
from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best


class Level:
    """Clusters of one kv head: raw centroids, the number of tokens in each, the label of every clustered token."""

    def __init__(self, centroids: list[np.ndarray], labels: list[int]):
        self.centroids, self.labels = centroids, labels
        self.counts = [labels.count(number) for number in range(len(centroids))]

    def weights(self, q: np.ndarray, kept: Sequence[bool] | None = None) -> list[float]:
        """S of each clustered token for a query; tokens not in `kept` count as if their clusters were empty."""
        kept = [True] * len(self.labels) if kept is None else kept
        counts = [0] * len(self.centroids)
        for token, label in enumerate(self.labels):
            counts[label] += kept[token]
        logits = [centroid @ q / math.sqrt(len(q)) for centroid in self.centroids]
        shift = max(logits)
        powers = [math.exp(logit - shift) for logit in logits]
        total = sum(count * power for count, power in zip(counts, powers, strict=True))
        return [powers[label] / total if kept[token] else 0.0 for token, label in enumerate(self.labels)]

    def passing(self, scores: np.ndarray, threshold: float) -> list[bool]:
        """Clustered tokens above the threshold; those of an only cluster, whose S is 1/N for any query."""
        only_one = sum(count > 0 for count in self.counts) == 1
        return [bool(s > threshold) or only_one for s in scores]


class NumpySqueezed(NumpyPolicy):
    """`draws(count)` gives the uniform numbers of the k-means++ starts. `coarse` None: one level.

    `thresholds` fixes the thresholds (fine, coarse) in place of the quantiles. `k` None: no cap.
    """

    def __init__(
        self,
        *,
        draws,
        k: int | None = None,
        cluster_size: int = 20,
        quantile: float = 0.9,
        window: int = 100,
        coarse_size: int | None = None,
        coarse_quantile: float = 0.7,
        iterations: int = 300,
        thresholds: tuple[float, float] | None = None,
    ):
        self.draws, self.k, self.cluster_size, self.quantile, self.window = draws, k, cluster_size, quantile, window
        self.coarse_size, self.coarse_quantile, self.iterations = coarse_size, coarse_quantile, iterations
        self.thresholds = thresholds
        self.fixed = thresholds is not None
        self.clustered = 0  # the prompt without its observation window
        self.fine: dict[int, list[Level]] = {}  # [layer][kv head]
        self.rough: dict[int, list[Level]] = {}
        self.observed: dict[int, tuple[Layer, list[np.ndarray]]] = {}
        self.selected: dict[int, list[list[list[int]]]] = {}
        self.overflow: dict[int, int] = {}
        self.margin = math.inf  # of the closest decision in any clustering

    def after_prompt(self, layer):
        self.selected[layer.number], self.overflow[layer.number] = [], 0
        self.clustered = max(0, layer.length - self.window)
        if self.clustered == 0:
            return
        self.fine[layer.number], self.rough[layer.number] = [], []
        for head in range(layer.config.kv_heads):
            keys = np.array([key[head] for key in layer.k[: self.clustered]])
            labels, members = self.kmeans(keys, self.cluster_size)
            fine = Level([np.mean(keys[m], axis=0) if m else np.zeros_like(keys[0]) for m in members], labels)
            self.fine[layer.number].append(fine)
            if self.coarse_size is not None:
                # an empty fine cluster is no point to cluster
                filled = [number for number, m in enumerate(members) if m]
                points = np.array([fine.centroids[number] for number in filled])
                parents, children = self.kmeans(points, self.coarse_size)
                centroids = [np.mean(points[c], axis=0) if c else np.zeros_like(points[0]) for c in children]
                parent = dict(zip(filled, parents, strict=True))
                self.rough[layer.number].append(Level(centroids, [parent[label] for label in labels]))
        self.observed[layer.number] = layer, layer.q[-self.window :]
        if layer.number == layer.config.layers - 1 and not self.fixed:
            self.calibrate()

    def kmeans(self, keys: np.ndarray, size: int) -> tuple[list[int], list[list[int]]]:
        """Labels and members of the clusters of directions, one cluster for every `size` clustered tokens."""
        number = min(max(1, self.clustered // size), len(keys))
        directions = keys / np.linalg.norm(keys, axis=1)[:, None]
        start = directions[spread(directions, self.draws(number))]
        _, labels, margin = lloyd(directions, start, self.iterations)
        self.margin = min(self.margin, margin)
        return labels, [[t for t, label in enumerate(labels) if label == c] for c in range(number)]

    def scores(self, levels: list[Level], queries: Sequence[np.ndarray], kept=None) -> list[np.ndarray]:
        """S per kv head: mean over the queries of the block, then the largest of the group."""
        out = []
        for head, level in enumerate(levels):
            group = len(queries[0]) // len(levels)
            means = [
                np.mean([level.weights(q[member], kept and kept[head]) for q in queries], axis=0)
                for member in range(head * group, (head + 1) * group)
            ]
            out.append(np.max(means, axis=0))
        return out

    def survivors(self, layer: Layer, queries: Sequence[np.ndarray], threshold: float) -> list[list[bool]]:
        levels = self.rough[layer.number]
        return [level.passing(s, threshold) for level, s in zip(levels, self.scores(levels, queries), strict=True)]

    def calibrate(self) -> None:
        """One threshold per level for the model, from the observation window as one block of queries."""
        rough = fine = 0.0
        kept = {}
        if self.coarse_size is not None:
            pool = [s for n, (_, queries) in self.observed.items() for s in self.scores(self.rough[n], queries)]
            rough = float(np.quantile(np.concatenate(pool), self.coarse_quantile))
            kept = {n: self.survivors(layer, queries, rough) for n, (layer, queries) in self.observed.items()}
        pool = [s for n, (_, queries) in self.observed.items() for s in self.scores(self.fine[n], queries, kept.get(n))]
        fine = float(np.quantile(np.concatenate(pool), self.quantile))
        self.thresholds = fine, rough

    def attention(self, layer, step):
        # newest first: the order of the cap among what is always kept
        always = list(range(layer.length - 1, self.clustered - 1, -1))
        unions = [always] * layer.config.kv_heads
        if self.thresholds and self.clustered:
            fine, rough = self.thresholds
            block = [layer.q[-1]]
            kept = self.survivors(layer, block, rough) if self.coarse_size is not None else None
            scores = self.scores(self.fine[layer.number], block, kept)
            passed = []
            for head, level in enumerate(self.fine[layer.number]):
                above = level.passing(scores[head], fine)
                # dropped at the coarse level is dropped, whatever the threshold of the fine one
                passed.append(above if kept is None else [a and b for a, b in zip(above, kept[head], strict=True)])
            unions = [
                always + [slot for slot in best(scores[head].tolist(), self.clustered) if passed[head][slot]]
                for head in range(layer.config.kv_heads)
            ]
        selected = [sorted(union[: self.k]) for union in unions]
        self.overflow[layer.number] += sum(len(u) - len(s) for u, s in zip(unions, selected, strict=True))
        self.selected[layer.number].append(selected)
        return layer.attend(layer.q[-1], selected)
