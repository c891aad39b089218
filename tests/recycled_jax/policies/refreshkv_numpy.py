"""RefreshKV in plain numpy, from its paper (arXiv 2411.05787)."""

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best


class NumpyRefreshKV(NumpyPolicy):
    """`threshold` None: fixed stride, otherwise the query check. A buffer of k slots per kv head, weakest first, None
    where empty. `heads`: how many query heads of a group are asked, the first ones; None for all."""

    def __init__(self, *, k, stride, threshold=None, max_stride=None, pool=7, refresh="full", heads=None):
        self.k, self.stride, self.threshold, self.max_stride = k, stride, threshold, max_stride
        self.pool, self.refresh, self.heads = pool, refresh, heads
        self.buffers: dict[int, list[list[int | None]]] = {}
        self.steps_since: dict[int, int] = {}
        self.query: dict[int, np.ndarray] = {}
        self.refreshes: dict[int, list[int]] = {}

    def after_prompt(self, layer):
        self.refreshes[layer.number] = []
        self.rebuild(layer)

    def attention(self, layer, step):
        if self.wants(layer, step):
            self.refreshes[layer.number].append(step)
            self.rebuild(layer)
            if self.refresh == "full":
                return layer.attend(layer.q[-1], layer.everything())
        else:
            for buffer in self.buffers[layer.number]:
                buffer[self.steps_since[layer.number] % self.k] = layer.length - 1
            self.steps_since[layer.number] += 1
        held = [[slot for slot in buffer if slot is not None] for buffer in self.buffers[layer.number]]
        return layer.attend(layer.q[-1], held)

    def wants(self, layer: Layer, step: int) -> bool:
        if self.threshold is None:
            return step % self.stride == 0
        now, then = layer.bare_q[-1].mean(axis=0), self.query[layer.number]
        cosine = now @ then / (np.linalg.norm(now) * np.linalg.norm(then))
        asked = step % self.stride == 0 and cosine <= self.threshold
        return asked or (self.max_stride is not None and self.steps_since[layer.number] + 1 >= self.max_stride)

    def rebuild(self, layer: Layer) -> None:
        self.steps_since[layer.number] = 0
        self.query[layer.number] = layer.bare_q[-1].mean(axis=0)
        self.buffers[layer.number] = []
        group = layer.config.group
        for head in range(layer.config.kv_heads):
            rows = [
                layer.probabilities(layer.q[-1][query_head], query_head, range(layer.length))
                for query_head in range(head * group, head * group + (self.heads or group))
            ]
            past = np.max(rows, axis=0)[:-1]  # the present token is forced: no candidate, and not pooled
            reach = self.pool // 2
            pooled = [past[max(0, t - reach) : t + reach + 1].max() for t in range(len(past))]
            weakest_first = best(pooled, self.k - 1)[::-1]
            empty = [None] * (self.k - 1 - len(weakest_first))
            self.buffers[layer.number].append([*empty, *weakest_first, layer.length - 1])

    def selections(self) -> list[list[list[int]]]:
        """Slots per layer and kv head, weakest first, -1 where empty."""
        layers = [self.buffers[number] for number in sorted(self.buffers)]
        return [[[-1 if slot is None else slot for slot in buffer] for buffer in layer] for layer in layers]
