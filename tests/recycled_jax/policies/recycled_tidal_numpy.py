"""RefreshKV over the steps and TidalDecode over the layers, in plain numpy."""

import numpy as np

from tests.recycled_jax.policies.less_is_more_numpy import union_weakest_first
from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy
from tests.recycled_jax.policies.tidal_numpy import NumpyTidal, correct


class NumpyRecycledTidal(NumpyPolicy):
    """Buffers of k slots per kv head, weakest first, None where empty. Selection layers decide when to rebuild theirs;
    the layers above take over whatever buffer the nearest one below has. `heads`: "union" (of the ranks of all query
    heads), "all" or "kv" (of reduced probabilities). `recent` counts the present token."""

    def __init__(
        self,
        *,
        k,
        stride,
        selection_layers,
        dense_layers=(0, 1),
        threshold=None,
        max_stride=None,
        heads="union",
        group_reduction="max",
        pool=1,
        sinks=4,
        recent=1,
        refresh="full",
        correct_every=None,
    ):
        self.k, self.stride, self.threshold, self.max_stride = k, stride, threshold, max_stride
        self.selection_layers, self.dense_layers = selection_layers, dense_layers
        self.heads, self.sinks, self.recent = heads, sinks, recent
        self.refresh, self.correct_every = refresh, correct_every
        self.reduced = NumpyTidal(
            k=k,
            selection_layers=selection_layers,
            group_reduction=group_reduction,
            heads=heads,
            pool=pool,
            sinks=sinks,
            recent=recent,
        )
        self.buffers: dict[int, list[list[int | None]]] = {}  # of the selection layers
        self.steps_since: dict[int, int] = {}
        self.query: dict[int, np.ndarray] = {}
        self.refreshes: dict[int, list[int]] = {}
        self.selected: dict[int, list[list[list[int]]]] = {}

    def after_prompt(self, layer):
        if layer.number in self.selection_layers:
            self.refreshes[layer.number] = []
            self.rebuild(layer)

    def attention(self, layer, step):
        if layer.number in self.dense_layers:
            return layer.attend(layer.q[-1], layer.everything())
        if layer.number in self.selection_layers:
            if self.wants(layer, step):
                self.refreshes[layer.number].append(step)
                self.rebuild(layer)
            else:
                for buffer in self.buffers[layer.number]:
                    buffer[self.steps_since[layer.number] % self.k] = layer.length - 1
                self.steps_since[layer.number] += 1
        parent = max(number for number in self.selection_layers if number <= layer.number)
        held = [sorted(slot for slot in buffer if slot is not None) for buffer in self.buffers[parent]]
        self.selected.setdefault(layer.number, []).append(held)
        fresh = layer.number in self.selection_layers and self.steps_since[layer.number] == 0
        if fresh and self.refresh == "full":
            return layer.attend(layer.q[-1], layer.everything())
        return layer.attend(layer.q[-1], held)

    def after_step(self, llama, step):
        if self.correct_every is not None and step % self.correct_every == 0:
            correct(llama, self.correct_every)

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
        if self.heads == "union":
            slots = union_weakest_first(layer, self.k, self.sinks, self.recent)
            sets = [slots] * layer.config.kv_heads
        else:
            sets = self.reduced.weakest_first(layer)
        self.buffers[layer.number] = [[*[None] * (self.k - len(slots)), *slots] for slots in sets]
