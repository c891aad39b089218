"""Prompts read layer by layer in plain numpy and float64, so that a rule sees all queries of a prompt at once. A
prefill method's oracle is a subclass of `NumpyPrefill` beside this file, written from the paper's rule."""

from collections.abc import Sequence

import numpy as np

from tests.recycled_jax.policies.numpy_llama import Layer, NumpyLlama, norm, rotate


class NumpyPrefill:
    """A rule for one prompt; `visible[layer]`, filled in here, is what it answered.

    The base class reads densely.
    """

    def __init__(self):
        self.visible: dict[int, list[list[list[int]]]] = {}

    def sees(self, layer: Layer) -> list[list[list[int]]]:
        """The slots that a query reads, ascending: [query head][token]. The layer holds the whole prompt."""
        return [[list(range(token + 1)) for token in range(layer.length)] for _ in range(layer.config.query_heads)]


class PrefilledLlama(NumpyLlama):
    """Greedy decoding under a policy, after a prompt read by a prefill method."""

    def __init__(self, config, params, prefill: NumpyPrefill, policy):
        super().__init__(config, params, policy)
        self.prefill = prefill

    def generate(self, prompt, new_tokens):
        out = [int(np.argmax(self.read(prompt)))]
        for layer in self.layers:
            self.policy.after_prompt(layer)
        for step in range(1, new_tokens):
            logits = self.forward(out[-1], step)
            self.policy.after_step(self, step)
            out.append(int(np.argmax(logits)))
        return out

    def read(self, prompt: Sequence[int]) -> np.ndarray:
        """Logits after the prompt."""
        self.tokens = list(prompt)
        x = [self.top["embed_tokens"][token] for token in prompt]
        for layer, w in zip(self.layers, self.weights, strict=True):
            for position in range(len(prompt)):
                h = norm(self.config, x[position], w["input_norm"])
                bare_q, bare_k, v = (np.einsum("e,ehd->hd", h, w[name]) for name in ("q_proj", "k_proj", "v_proj"))
                layer.bare_q.append(bare_q)
                layer.bare_k.append(bare_k)
                layer.q.append(rotate(self.config, bare_q, position))
                layer.k.append(rotate(self.config, bare_k, position))
                layer.v.append(v)
            self.prefill.visible[layer.number] = sees = self.prefill.sees(layer)
            for position in range(len(prompt)):
                attended = attention(layer, position, [row[position] for row in sees])
                x[position] = x[position] + np.einsum("hd,hde->e", attended, w["o_proj"])
                h = norm(self.config, x[position], w["mlp_norm"])
                gate = h @ w["gate_proj"]
                x[position] = x[position] + (gate / (1 + np.exp(-gate)) * (h @ w["up_proj"])) @ w["down_proj"]
        last = norm(self.config, x[-1], self.top["final_norm"])
        return last @ self.top["lm_head"] if "lm_head" in self.top else self.top["embed_tokens"] @ last


def attention(layer: Layer, token: int, slots_of_heads: Sequence[Sequence[int]]) -> np.ndarray:
    """What a token of the prompt gets from the slots that each of its query heads reads: [query_heads, head_dim]."""
    out = []
    for query_head, slots in enumerate(slots_of_heads):
        values = np.array([layer.v[slot][query_head // layer.config.group] for slot in slots])
        out.append(layer.probabilities(layer.q[token][query_head], query_head, slots) @ values)
    return np.array(out)
