"""RefreshKV written once more, in plain numpy and float64, from its paper (arXiv 2411.05787): one row at a time, Python
lists for the buffer, no shared code with the library. Slow, obvious, independent."""

from dataclasses import dataclass, field

import numpy as np

from recycled_jax.config import LlamaConfig


@dataclass
class Layer:
    """Keys and values of every token so far, `[kv_head][token]`, and the recycled buffer as slot numbers."""

    k: list
    v: list
    buffer: list = field(default_factory=list)  # per kv head: slots, weakest first; None where empty
    steps_since: int = 0
    query: np.ndarray | None = None


class NumpyRefreshKV:
    """Greedy decoding of one prompt. `threshold` None: fixed stride, otherwise the query check."""

    def __init__(
        self, config: LlamaConfig, params, *, k, stride, threshold=None, max_stride=None, pool=7, refresh="full"
    ):
        self.c, self.k, self.stride, self.threshold, self.pool = config, k, stride, threshold, pool
        self.max_stride, self.refresh = max_stride, refresh
        tree = params["params"]
        self.top = {name: np.asarray(w, np.float64) for name, w in tree.items() if name != "layers"}
        self.w = [
            {name: np.asarray(w[layer], np.float64) for name, w in tree["layers"].items()}
            for layer in range(config.layers)
        ]
        self.frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        self.refreshes: list[list[int]] = [[] for _ in range(config.layers)]

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        self.layers = [
            Layer([[] for _ in range(self.c.kv_heads)], [[] for _ in range(self.c.kv_heads)])
            for _ in range(self.c.layers)
        ]
        for position, token in enumerate(prompt):
            logits = self._forward(token, position, step=0, last_of_prompt=position == len(prompt) - 1)
        out = [int(np.argmax(logits))]
        for step in range(1, new_tokens):
            logits = self._forward(out[-1], len(prompt) + step - 1, step, False)
            out.append(int(np.argmax(logits)))
        return out

    def selections(self) -> list[list[list[int]]]:
        """Slots per layer and kv head, weakest first, -1 where empty."""
        return [[[-1 if s is None else s for s in head] for head in layer.buffer] for layer in self.layers]

    def _forward(self, token, position, step, last_of_prompt):
        x = self.top["embed_tokens"][token]
        for number, (layer, w) in enumerate(zip(self.layers, self.w, strict=True)):
            h = self._norm(x, w["input_norm"])
            bare_q = np.einsum("e,ehd->hd", h, w["q_proj"])
            q = self._rotate(bare_q, position)
            key = self._rotate(np.einsum("e,ehd->hd", h, w["k_proj"]), position)
            value = np.einsum("e,ehd->hd", h, w["v_proj"])
            for head in range(self.c.kv_heads):
                layer.k[head].append(key[head])
                layer.v[head].append(value[head])
            query = bare_q.mean(axis=0)
            if step == 0:
                attended = self._attend(layer, q, [list(range(position + 1))] * self.c.kv_heads)
                if last_of_prompt:
                    self._rebuild(layer, q, position)
                    layer.query = query
            elif self._wants(layer, query, step):
                self.refreshes[number].append(step)
                self._rebuild(layer, q, position)
                layer.steps_since, layer.query = 0, query
                everything = [list(range(position + 1))] * self.c.kv_heads
                attended = self._attend(layer, q, everything if self.refresh == "full" else layer.buffer)
            else:
                for head in range(self.c.kv_heads):
                    layer.buffer[head][layer.steps_since % self.k] = position
                layer.steps_since += 1
                attended = self._attend(layer, q, layer.buffer)
            x = x + np.einsum("hd,hde->e", attended, w["o_proj"])
            h = self._norm(x, w["mlp_norm"])
            gate = h @ w["gate_proj"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up_proj"])) @ w["down_proj"]
        x = self._norm(x, self.top["final_norm"])
        return x @ self.top["lm_head"] if "lm_head" in self.top else self.top["embed_tokens"] @ x

    def _wants(self, layer, query, step):
        if self.threshold is None:
            return step % self.stride == 0
        cosine = query @ layer.query / (np.linalg.norm(query) * np.linalg.norm(layer.query))
        return (step % self.stride == 0 and cosine <= self.threshold) or layer.steps_since + 1 >= self.max_stride

    def _rebuild(self, layer, q, position):
        layer.buffer = []
        for head in range(self.c.kv_heads):
            best = np.zeros(position + 1)
            for member in range(self.c.group):
                best = np.maximum(best, self._probabilities(layer, q[head * self.c.group + member], head, None))
            past = best[:position]  # the current token is forced, not a candidate, and not pooled
            reach = self.pool // 2
            pooled = [past[max(0, t - reach) : t + reach + 1].max() for t in range(position)]
            ranked = sorted(range(position), key=lambda t: (-pooled[t], t))[: self.k - 1]
            weakest_first = ranked[::-1]
            empty = [None] * (self.k - 1 - len(weakest_first))
            layer.buffer.append([*empty, *weakest_first, position])

    def _attend(self, layer, q, slots_by_head):
        out = np.zeros((self.c.query_heads, self.c.head_dim))
        for h in range(self.c.query_heads):
            head = h // self.c.group
            slots = [s for s in slots_by_head[head] if s is not None]
            out[h] = self._probabilities(layer, q[h], head, slots) @ np.array([layer.v[head][s] for s in slots])
        return out

    def _probabilities(self, layer, q, head, slots):
        slots = range(len(layer.k[head])) if slots is None else slots
        logits = np.array([layer.k[head][s] @ q for s in slots]) / np.sqrt(self.c.head_dim)
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def _norm(self, x, scale):
        return x / np.sqrt(np.mean(x * x) + self.c.norm_eps) * scale

    def _rotate(self, x, position):
        half = self.c.head_dim // 2
        angle = position * self.frequency
        first, second = x[:, :half], x[:, half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=1
        )
