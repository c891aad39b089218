"""AttentionPredictor in plain numpy, from its paper (arXiv 2502.04077)."""

from collections.abc import Callable

import numpy as np

from tests.recycled_jax.policies.infllm_numpy import middle_blocks
from tests.recycled_jax.policies.numpy_llama import Layer, NumpyPolicy, best

Predictor = Callable[[np.ndarray], np.ndarray]  # [rows, columns], the newest row last -> [columns]


def exponential_average(decay: float) -> Predictor:
    """A row counts `decay` times as much as the one after it."""

    def predict(rows):
        weights = np.array([decay ** (len(rows) - 1 - i) for i in range(len(rows))])
        return weights @ rows / weights.sum()

    return predict


class ConvPredictor:
    """Two 3x3 convolutions, an average over the rows in which the newer count more, one weighted sum of the channels;
    of rows relative to their largest value."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.w = {name: np.asarray(value, np.float64) for name, value in weights.items()}

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        largest = rows.max() or 1.0
        hidden = self.convolve(rows[:, :, None] / largest, self.w["conv1"], self.w["bias1"])
        hidden = self.convolve(np.maximum(hidden, 0), self.w["conv2"], self.w["bias2"])
        counts = np.array([float(self.w["decay"]) ** (len(rows) - 1 - i) for i in range(len(rows))])
        average = np.einsum("r,rbc->bc", counts / counts.sum(), np.maximum(hidden, 0))
        return (average @ self.w["out"] + self.w["out_bias"]) * rows.max()

    @staticmethod
    def convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """`x` [rows, columns, channels in], `kernel` [3, 3, channels in, channels out]; zeros around `x`."""
        rows, columns, _ = x.shape
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        out = np.zeros((rows, columns, kernel.shape[-1])) + bias
        for down in range(3):
            for right in range(3):
                out += padded[down : down + rows, right : right + columns] @ kernel[down, right]
        return out


class NumpyAttentionPredictor(NumpyPolicy):
    """Every step reads the blocks whose probabilities the predictor expects to be high, sinks and recent window."""

    def __init__(self, *, k, block, sinks, recent, history, calibration, predict: Predictor, dense_layers=()):
        self.k, self.block, self.sinks, self.recent = k, block, sinks, recent
        self.history, self.calibration, self.predict = history, calibration, predict
        self.dense_layers = dense_layers
        self.rows: dict[int, list[list[dict[int, float]]]] = {}  # [layer][query head][row][block]
        self.selected: dict[int, list[list[list[int]]]] = {}

    def prompt_attention(self, layer):
        self.push(layer, layer.everything())
        return layer.attend(layer.q[-1], layer.everything())

    def after_prompt(self, layer):
        if layer.number not in self.dense_layers:
            self.selected[layer.number] = []

    def attention(self, layer, step):
        if layer.number in self.dense_layers:
            return layer.attend(layer.q[-1], layer.everything())
        held = [self.select(layer, head) for head in range(layer.config.kv_heads)]
        self.selected[layer.number].append(held)
        self.push(layer, layer.everything() if step % self.calibration == 0 else held)
        return layer.attend(layer.q[-1], held)

    def push(self, layer: Layer, held: list[list[int]]) -> None:
        """Remember the probabilities of the present query, of every block the largest."""
        heads = self.rows.setdefault(layer.number, [[] for _ in range(layer.config.query_heads)])
        for query_head in range(layer.config.query_heads):
            slots = held[query_head // layer.config.group]
            row: dict[int, float] = {}
            for slot, p in zip(slots, layer.probabilities(layer.q[-1][query_head], query_head, slots), strict=True):
                row[slot // self.block] = max(row.get(slot // self.block, 0.0), p)
            heads[query_head] = [*heads[query_head], row][-self.history :]

    def select(self, layer: Layer, head: int) -> list[int]:
        if layer.length <= self.k:
            return list(range(layer.length))
        blocks = middle_blocks(layer.length, block=self.block, sinks=self.sinks, recent=self.recent)
        columns = [slots[0] // self.block for slots in blocks]
        group = layer.config.group
        histories = self.rows[layer.number][head * group : (head + 1) * group]
        scores = np.max([self.predict(self.seen(rows, columns)) for rows in histories], axis=0)
        chosen = best(scores.tolist(), (self.k - self.sinks - self.recent) // self.block)
        slots = {slot for i in chosen for slot in blocks[i]}
        slots |= set(range(self.sinks)) | set(range(layer.length - self.recent, layer.length))
        return sorted(slots)

    def seen(self, rows: list[dict[int, float]], columns: list[int]) -> np.ndarray:
        """The history as an array; before the prompt's first token there were rows of zeros."""
        array = np.zeros((self.history, len(columns)))
        for i, row in enumerate(rows, start=self.history - len(rows)):
            array[i] = [row.get(column, 0.0) for column in columns]
        return array
