"""DoubleSparse in plain numpy, from its paper (arXiv 2408.07092): logits of a few channels choose the slots."""

from collections import defaultdict

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best, softmax


class NumpyDoubleSparse(NumpyPolicy):
    """`table[layer][kv_head]`: its channels; None: those strongest in the prompt. Labels of 4 bits know sixteen values
    of a channel, evenly from its smallest to its largest in the prompt."""

    def __init__(self, *, k, reduction=4, label_bits=16, dense_layers=(0, 1), table=None):
        self.k, self.reduction, self.label_bits, self.dense_layers = k, reduction, label_bits, dense_layers
        self.table = {} if table is None else dict(enumerate(table))
        self.calibrated = table is not None
        self.ranges: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # smallest and largest [kv_heads, head_dim]
        self.selected = defaultdict(list)

    def after_prompt(self, layer):
        if not self.calibrated:
            kept = layer.config.head_dim // self.reduction
            self.table[layer.number] = [best(row.tolist(), kept) for row in channel_strengths(layer)]
        self.ranges[layer.number] = np.min(layer.k, axis=0), np.max(layer.k, axis=0)

    def attention(self, layer, step):
        if layer.number in self.dense_layers:
            return layer.attend(layer.q[-1], layer.everything())
        chosen = []
        for head in range(layer.config.kv_heads):
            channels = self.table[layer.number][head]
            labels = [self.label(layer, head, slot)[channels] for slot in range(layer.length)]
            rows = []
            for query_head in range(head * layer.config.group, (head + 1) * layer.config.group):
                q = layer.q[-1][query_head][channels]
                rows.append(softmax(np.array([q @ label for label in labels]) / np.sqrt(layer.config.head_dim)))
            past = best(np.max(rows, axis=0)[:-1].tolist(), self.k - 1)
            chosen.append(sorted([*past, layer.length - 1]))
        self.selected[layer.number].append(chosen)
        return layer.attend(layer.q[-1], chosen)

    def label(self, layer: Layer, head: int, slot: int) -> np.ndarray:
        """What is known of a key [head_dim]."""
        key = layer.k[slot][head]
        if self.label_bits == 16:
            return key
        low, high = (extreme[head] for extreme in self.ranges[layer.number])
        known = []
        for channel, value in enumerate(key):
            step = (high[channel] - low[channel]) / 15
            code = np.clip(np.round((value - low[channel]) / step), 0, 15) if step > 0 else 0
            known.append(low[channel] + code * step)
        return np.array(known)


def channel_strengths(layer: Layer) -> list[np.ndarray]:
    """Mean |q k| of every channel over the tokens seen, query and key of the same token, summed over the group."""
    strengths = []
    for head in range(layer.config.kv_heads):
        total = np.zeros(layer.config.head_dim)
        for q, k in zip(layer.q, layer.k, strict=True):
            for query_head in range(head * layer.config.group, (head + 1) * layer.config.group):
                total += np.abs(q[query_head] * k[head])
        strengths.append(total / layer.length)
    return strengths
