"""InfLLM's choice of blocks in plain numpy, from its paper (arXiv 2402.04617), decoding only."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best


def middle_blocks(length: int, *, block: int, sinks: int, recent: int) -> list[list[int]]:
    """The slots between sinks and recent window, cut where slot numbers are multiples of `block`."""
    blocks: dict[int, list[int]] = {}
    for slot in range(sinks, length - recent):
        blocks.setdefault(slot // block, []).append(slot)
    return [blocks[number] for number in sorted(blocks)]


class NumpyInfLLM(NumpyPolicy):
    """Sinks, recent window and the best blocks in between, the same for all heads, which `selected` tells once.

    A block is represented, for every query head, by the mean of the keys that received most attention while they were
    in the recent window.
    """

    def __init__(self, *, k, block, sinks, recent, representatives=4):
        self.k, self.block, self.sinks, self.recent = k, block, sinks, recent
        self.representatives = representatives
        self.received: dict[int, list[dict[int, float]]] = {}  # [layer][query head][slot]
        self.selected: dict[int, list[list[list[int]]]] = {}

    def prompt_attention(self, layer):
        self.observe(layer, layer.everything())
        return layer.attend(layer.q[-1], layer.everything())

    def after_prompt(self, layer):
        self.selected[layer.number] = []

    def attention(self, layer, step):
        slots = self.select(layer)
        held = [slots] * layer.config.kv_heads
        self.selected[layer.number].append([slots])
        self.observe(layer, held)
        return layer.attend(layer.q[-1], held)

    def observe(self, layer: Layer, held: list[list[int]]) -> None:
        """Add what the slots of the recent window receive from the present query."""
        received = self.received.setdefault(layer.number, [{} for _ in range(layer.config.query_heads)])
        for query_head in range(layer.config.query_heads):
            slots = held[query_head // layer.config.group]
            for slot, p in zip(slots, layer.probabilities(layer.q[-1][query_head], query_head, slots), strict=True):
                if slot >= layer.length - self.recent:
                    received[query_head][slot] = received[query_head].get(slot, 0.0) + p

    def select(self, layer: Layer) -> list[int]:
        if layer.length <= self.k:
            return list(range(layer.length))
        blocks = middle_blocks(layer.length, block=self.block, sinks=self.sinks, recent=self.recent)
        scores = [self.score(layer, slots) for slots in blocks]
        return self.with_blocks(layer, [blocks[i] for i in best(scores, self.block_budget)])

    @property
    def block_budget(self) -> int:
        return (self.k - self.sinks - self.recent) // self.block

    def with_blocks(self, layer: Layer, blocks: list[list[int]]) -> list[int]:
        slots = {slot for slots in blocks for slot in slots}
        slots |= set(range(self.sinks)) | set(range(layer.length - self.recent, layer.length))
        return sorted(slots)

    def score(self, layer: Layer, slots: list[int]) -> float:
        return float(layer.q[-1].ravel() @ self.representative(layer, slots))

    def representative(self, layer: Layer, slots: list[int]) -> np.ndarray:
        """Of a block; query heads one after the other, [query_heads * head_dim]."""
        parts = []
        for query_head in range(layer.config.query_heads):
            received = [self.received[layer.number][query_head][slot] for slot in slots]
            heaviest = [slots[i] for i in best(received, self.representatives)]
            keys = [layer.k[slot][query_head // layer.config.group] for slot in heaviest]
            parts.append(np.mean(keys, axis=0))
        return np.concatenate(parts)
