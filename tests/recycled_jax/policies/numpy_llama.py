"""The model and greedy decoding once more, in plain numpy and float64: one row at a time, keys and values in lists, no
code shared with the library. A policy's oracle is a subclass of `NumpyPolicy` beside it, written from the paper's rule.
Slow, obvious, independent."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from recycled_jax.config import LlamaConfig


@dataclass
class Layer:
    """What one layer has seen: of every token so far, the present one last. `bare_q` is `q` before rotation."""

    config: LlamaConfig
    number: int
    k: list[np.ndarray] = field(default_factory=list)  # [token] of [kv_heads, head_dim], rotated
    v: list[np.ndarray] = field(default_factory=list)
    q: list[np.ndarray] = field(default_factory=list)  # [token] of [query_heads, head_dim]
    bare_q: list[np.ndarray] = field(default_factory=list)
    bare_k: list[np.ndarray] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.k)

    def logits(self, q: np.ndarray, query_head: int, slots: Sequence[int]) -> np.ndarray:
        """Scaled products of a query [head_dim] of that query head with the keys in `slots`."""
        head = query_head // self.config.group
        keys = np.array([self.k[slot][head] for slot in slots]).reshape(-1, self.config.head_dim)
        return keys @ q / np.sqrt(self.config.head_dim)

    def probabilities(self, q: np.ndarray, query_head: int, slots: Sequence[int]) -> np.ndarray:
        """Their softmax over `slots`."""
        return softmax(self.logits(q, query_head, slots))

    def attend(self, q: np.ndarray, slots_of_heads: Sequence[Sequence[int]]) -> np.ndarray:
        """Attention of the queries over the slots of their kv heads, both [query_heads, head_dim]."""
        out = np.zeros((self.config.query_heads, self.config.head_dim))
        for query_head in range(self.config.query_heads):
            head = query_head // self.config.group
            slots = list(slots_of_heads[head])
            values = np.array([self.v[slot][head] for slot in slots])
            out[query_head] = self.probabilities(q[query_head], query_head, slots) @ values
        return out

    def everything(self) -> list[list[int]]:
        """All slots so far, for every kv head."""
        return [list(range(self.length))] * self.config.kv_heads


class NumpyPolicy:
    """A rule for one row. Called once per layer after the prompt, then once per layer and step.

    Keep what the rule remembers in attributes, by `layer.number`; an instance serves one prompt.
    `selected[layer][step - 1]`, if the rule fills it, is what was attended: slots per kv head.
    """

    def prompt_attention(self, layer: Layer) -> np.ndarray:
        """Attention of a prompt token; dense, unless the method changes the prefill."""
        return layer.attend(layer.q[-1], layer.everything())

    def after_prompt(self, layer: Layer) -> None:
        """The layer has seen the whole prompt; all its queries are in `layer.q`."""

    def attention(self, layer: Layer, step: int) -> np.ndarray:
        """Attention of the present token, which stands in the layer's lists already; step 1 is the first."""
        raise NotImplementedError

    def after_step(self, llama: "NumpyLlama", step: int) -> None:
        """All layers have run."""


class Full(NumpyPolicy):
    """Dense attention."""

    def attention(self, layer, step):
        return layer.attend(layer.q[-1], layer.everything())


class NumpyLlama:
    """Greedy decoding of one prompt under a policy."""

    def __init__(self, config: LlamaConfig, params, policy: NumpyPolicy):
        self.config, self.policy = config, policy
        tree = params["params"]
        self.top = {name: np.asarray(w, np.float64) for name, w in tree.items() if name != "layers"}
        self.weights = [
            {name: np.asarray(w[layer], np.float64) for name, w in tree["layers"].items()}
            for layer in range(config.layers)
        ]
        self.layers = [Layer(config, number) for number in range(config.layers)]
        self.tokens: list[int] = []  # everything that went in

    def generate(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The generated tokens; the first comes from the prompt's logits, so there are `new_tokens - 1` steps."""
        for token in prompt:
            logits = self.forward(token, 0)
        for layer in self.layers:
            self.policy.after_prompt(layer)
        out = [int(np.argmax(logits))]
        for step in range(1, new_tokens):
            logits = self.forward(out[-1], step)
            self.policy.after_step(self, step)
            out.append(int(np.argmax(logits)))
        return out

    def forward(self, token: int, step: int) -> np.ndarray:
        """Logits after one more token; step 0 is the prompt."""
        position = len(self.tokens)
        self.tokens.append(token)
        x = self.top["embed_tokens"][token]
        for layer, w in zip(self.layers, self.weights, strict=True):
            h = norm(self.config, x, w["input_norm"])
            bare_q, bare_k, v = (np.einsum("e,ehd->hd", h, w[name]) for name in ("q_proj", "k_proj", "v_proj"))
            layer.bare_q.append(bare_q)
            layer.bare_k.append(bare_k)
            layer.q.append(rotate(self.config, bare_q, position))
            layer.k.append(rotate(self.config, bare_k, position))
            layer.v.append(v)
            attended = self.policy.attention(layer, step) if step else self.policy.prompt_attention(layer)
            x = x + np.einsum("hd,hde->e", attended, w["o_proj"])
            h = norm(self.config, x, w["mlp_norm"])
            gate = h @ w["gate_proj"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up_proj"])) @ w["down_proj"]
        x = norm(self.config, x, self.top["final_norm"])
        return x @ self.top["lm_head"] if "lm_head" in self.top else self.top["embed_tokens"] @ x


def norm(config: LlamaConfig, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + config.norm_eps) * scale


def rotate(config: LlamaConfig, x: np.ndarray, position: float) -> np.ndarray:
    """`x` [heads, head_dim] turned to a position (from another one: by the difference)."""
    half = config.head_dim // 2
    angle = position * config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=1
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def best(scores: Sequence[float], count: int) -> list[int]:
    """Places of the `count` largest, descending, ties to the earlier."""
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[: max(count, 0)]
