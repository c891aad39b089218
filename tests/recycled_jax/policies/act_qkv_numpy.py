"""ActQKV's decoding part in plain numpy, from its paper (arXiv 2502.13542)."""

import numpy as np

from tests.recycled_jax.policies.infllm_numpy import NumpyInfLLM, middle_blocks
from tests.recycled_jax.policies.numpy_llama import Layer, best, softmax


def probe_query(window: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """The queries [window, channels] weighted by how far they deviate from the running statistics [channels]."""
    deviations = ((window - mean) ** 2 / (variance + variance.mean() / 100)).mean(axis=1)
    return deviations @ window / deviations.sum()


def layer_budgets(entropies: list[float], block_budget: int, fewest: int) -> list[int]:
    """Blocks for every layer, in proportion to its entropy; what is granted is taken off for the layers after it."""
    fewest = min(fewest, block_budget)
    left = block_budget * len(entropies)
    granted = []
    for layer in range(len(entropies)):
        share = entropies[layer] / sum(entropies[layer:]) * left
        granted.append(int(np.clip(np.floor(share + 0.5), fewest, 2 * block_budget)))
        left -= granted[-1]
    return granted


class NumpyActQKV(NumpyInfLLM):
    """Blocks by the cosine of query and representative; layers whose scores are spread out get more of them.

    `k` is the mean budget over the layers. Until every layer has `samples` entropies the budgets are equal; those of a
    step come from the entropies of the steps before it.
    """

    def __init__(self, *, k, block, sinks, recent, representatives=4, samples=100, fewest=32):
        super().__init__(k=k, block=block, sinks=sinks, recent=recent, representatives=representatives)
        self.samples, self.fewest = samples, fewest
        self.entropies: dict[int, list[float]] = {}
        self.budgets: list[list[int]] = []  # [step][layer]
        self.statistics: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}

    def prompt_attention(self, layer):
        self.update_statistics(layer)
        return super().prompt_attention(layer)

    def after_prompt(self, layer):
        super().after_prompt(layer)
        self.entropies[layer.number] = []

    def attention(self, layer, step):
        self.update_statistics(layer)
        if layer.number == 0:
            self.budgets.append(self.present_budgets(layer.config.layers))
        return super().attention(layer, step)

    def update_statistics(self, layer: Layer) -> None:
        """Welford's mean and variance of the concatenated query, the count capped at 1000."""
        q = layer.q[-1].ravel()
        count, mean, variance = self.statistics.get(layer.number, (0, np.zeros_like(q), np.zeros_like(q)))
        count = min(count + 1, 1000)
        delta = q - mean
        mean = mean + delta / count
        variance = variance + (delta * (q - mean) - variance) / count
        self.statistics[layer.number] = count, mean, variance

    def present_budgets(self, layers: int) -> list[int]:
        if any(len(self.entropies[number]) < self.samples for number in range(layers)):
            return [self.block_budget] * layers
        means = [float(np.mean(self.entropies[number][-self.samples :])) for number in range(layers)]
        return layer_budgets(means, self.block_budget, self.fewest)

    def select(self, layer):
        blocks = middle_blocks(layer.length, block=self.block, sinks=self.sinks, recent=self.recent)
        scores = np.array([self.score(layer, slots) for slots in blocks])
        if len(blocks) > 1:
            p = softmax(scores)
            self.entropies[layer.number].append(float(-(p * np.log(p)).sum() / np.log(len(blocks))))
        if layer.length <= self.k:
            return list(range(layer.length))
        budget = self.budgets[-1][layer.number]
        return self.with_blocks(layer, [blocks[i] for i in best(scores.tolist(), budget)])

    def score(self, layer, slots):
        _, mean, variance = self.statistics[layer.number]
        probe = probe_query(layer.q[-1].reshape(1, -1), mean, variance)
        rep = self.representative(layer, slots)
        return float(probe @ rep / (np.linalg.norm(probe) * np.linalg.norm(rep)))
