"""TokenSelect in plain numpy, from its paper (arXiv 2411.02886)."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best, rotate, softmax


class NumpyTokenSelect(NumpyPolicy):
    """All heads vote for slots of the middle region; one set for all of them, with the sinks and the recent window.

    A selection is kept while the concatenated query (before rotation) stays at least `threshold` close to the one that
    made it, for at most `max_stride` steps; meanwhile its window grows beyond `k`. `positions="compact"`: keys vote
    from a distance of `recent`, and are attended at their ranks in the set. `selected` tells the one set once.
    """

    def __init__(self, *, k, sinks, recent, threshold=2.0, max_stride=1, pool=1, vote_scale=1.0, positions="true"):
        self.k, self.sinks, self.recent, self.threshold, self.max_stride = k, sinks, recent, threshold, max_stride
        self.pool, self.vote_scale, self.positions = pool, vote_scale, positions
        self.chosen: dict[int, list[int]] = {}
        self.window_start: dict[int, int] = {}
        self.query: dict[int, np.ndarray] = {}
        self.steps_since: dict[int, int] = {}
        self.retrievals: dict[int, list[int]] = {}
        self.selected: dict[int, list[list[list[int]]]] = {}

    def after_prompt(self, layer):
        self.retrievals[layer.number] = []
        self.selected[layer.number] = []
        self.retrieve(layer)

    def attention(self, layer, step):
        if self.wants(layer):
            self.retrievals[layer.number].append(step)
            self.retrieve(layer)
        else:
            self.steps_since[layer.number] += 1
        kept, start = set(self.chosen[layer.number]), self.window_start[layer.number]
        slots = [slot for slot in range(layer.length) if slot < self.sinks or slot in kept or slot >= start]
        self.selected[layer.number].append([slots])
        if self.positions == "true":
            return layer.attend(layer.q[-1], [slots] * layer.config.kv_heads)
        return self.attend_compactly(layer, slots)

    def wants(self, layer: Layer) -> bool:
        now, then = layer.bare_q[-1].ravel(), self.query[layer.number]
        cosine = now @ then / (np.linalg.norm(now) * np.linalg.norm(then))
        return bool(cosine < self.threshold) or self.steps_since[layer.number] + 1 >= self.max_stride

    def retrieve(self, layer: Layer) -> None:
        self.steps_since[layer.number] = 0
        self.query[layer.number] = layer.bare_q[-1].ravel()
        self.window_start[layer.number] = layer.length - self.recent
        middle = list(range(self.sinks, layer.length - self.recent))
        self.chosen[layer.number] = []
        if middle:
            votes = self.votes(layer, middle)
            reach = self.pool // 2
            pooled = [votes[max(0, i - reach) : i + reach + 1].max() for i in range(len(votes))]
            places = best(pooled, self.k - self.sinks - self.recent)
            self.chosen[layer.number] = sorted(middle[place] for place in places)

    def votes(self, layer: Layer, middle: list[int]) -> np.ndarray:
        """Sum over all query heads of their probabilities over the middle region."""
        total = np.zeros(len(middle))
        for query_head in range(layer.config.query_heads):
            head = query_head // layer.config.group
            if self.positions == "true":
                q, keys = layer.q[-1][query_head], [layer.k[slot][head] for slot in middle]
            else:
                q = rotate(layer.config, layer.bare_q[-1], self.recent)[query_head]
                keys = [layer.bare_k[slot][head] for slot in middle]
            total += softmax(self.vote_scale * (np.array(keys) @ q))
        return total

    def attend_compactly(self, layer: Layer, slots: list[int]) -> np.ndarray:
        q = rotate(layer.config, layer.bare_q[-1], len(slots) - 1)
        keys = np.array([rotate(layer.config, layer.bare_k[slot], rank) for rank, slot in enumerate(slots)])
        values = np.array([layer.v[slot] for slot in slots])
        out = np.zeros_like(q)
        for query_head in range(layer.config.query_heads):
            head = query_head // layer.config.group
            logits = keys[:, head] @ q[query_head] / np.sqrt(layer.config.head_dim)
            out[query_head] = softmax(logits) @ values[:, head]
        return out
