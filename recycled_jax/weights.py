"""One declaration per weight: shape, logical axes, initializer and its name and layout in Hugging Face
checkpoints.

Everything else follows from these two tables: parameter creation (`model`), shardings (`sharding`), and
reading and writing checkpoints (`hf`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from flax import linen as nn

from recycled_jax.config import LlamaConfig


@dataclass(frozen=True)
class Weight:
    """One weight of the model, or of one layer.

    Ours is `shape`, input dimensions first, heads and head_dim apart. Hugging Face stores matrices as
    `[outputs, inputs]`, each side flattened. `inputs` counts the leading input dimensions of a matrix; 0 is a
    vector (norms and biases), None a table stored as it is.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf: str
    init: nn.initializers.Initializer
    inputs: int | None = 0

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if self.inputs is None:
            return self.shape
        if self.inputs == 0:
            return (math.prod(self.shape),)
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """`tensor` of `hf_shape` in our layout; a view where possible."""
        return (tensor.T if self.inputs else tensor).reshape(self.shape)

    def to_hf(self, tensor: np.ndarray) -> np.ndarray:
        """Inverse of `from_hf`, contiguous as safetensors requires."""
        if self.inputs:
            return np.ascontiguousarray(tensor.reshape(self.hf_shape[::-1]).T)
        return np.ascontiguousarray(tensor.reshape(self.hf_shape))


def layer_weights(config: LlamaConfig) -> dict[str, Weight]:
    """The weights of one layer; `hf` names are relative to `model.layers.N.`."""
    c = config
    init = nn.initializers.normal(c.init_std)
    # residual branches start smaller, so that depth does not grow the residual stream (GPT-2, section 2.3)
    init_residual = nn.initializers.normal(c.init_std / math.sqrt(2 * c.layers))
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    query, kv = (c.query_heads, c.head_dim), (c.kv_heads, c.head_dim)
    query_axes, kv_axes = ("query_heads", "head_dim"), ("kv_heads", "head_dim")
    weights = {
        "input_norm": Weight((c.embed,), ("embed",), "input_layernorm.weight", ones),
        "q_proj": Weight((c.embed, *query), ("embed", *query_axes), "self_attn.q_proj.weight", init, 1),
        "k_proj": Weight((c.embed, *kv), ("embed", *kv_axes), "self_attn.k_proj.weight", init, 1),
        "v_proj": Weight((c.embed, *kv), ("embed", *kv_axes), "self_attn.v_proj.weight", init, 1),
        "o_proj": Weight((*query, c.embed), (*query_axes, "embed"), "self_attn.o_proj.weight", init_residual, 2),
        "mlp_norm": Weight((c.embed,), ("embed",), "post_attention_layernorm.weight", ones),
        "gate_proj": Weight((c.embed, c.mlp), ("embed", "mlp"), "mlp.gate_proj.weight", init, 1),
        "up_proj": Weight((c.embed, c.mlp), ("embed", "mlp"), "mlp.up_proj.weight", init, 1),
        "down_proj": Weight((c.mlp, c.embed), ("mlp", "embed"), "mlp.down_proj.weight", init_residual, 1),
    }
    if c.qkv_bias:
        weights["q_bias"] = Weight(query, query_axes, "self_attn.q_proj.bias", zeros)
        weights["k_bias"] = Weight(kv, kv_axes, "self_attn.k_proj.bias", zeros)
        weights["v_bias"] = Weight(kv, kv_axes, "self_attn.v_proj.bias", zeros)
    if c.qk_norm:
        weights["q_norm"] = Weight((c.head_dim,), ("head_dim",), "self_attn.q_norm.weight", ones)
        weights["k_norm"] = Weight((c.head_dim,), ("head_dim",), "self_attn.k_norm.weight", ones)
    return weights


def model_weights(config: LlamaConfig) -> dict[str, Weight]:
    """The weights outside the layers; tied models have no `lm_head`."""
    c = config
    init = nn.initializers.normal(c.init_std)
    weights = {
        "embed_tokens": Weight((c.vocab, c.embed), ("vocab", "embed"), "model.embed_tokens.weight", init, None),
        "final_norm": Weight((c.embed,), ("embed",), "model.norm.weight", nn.initializers.ones),
    }
    if not c.tie_embeddings:
        weights["lm_head"] = Weight((c.embed, c.vocab), ("embed", "vocab"), "lm_head.weight", init, 1)
    return weights


def map_weights(config: LlamaConfig, of_model, of_layer) -> dict:
    """A parameter tree with `of_model(weight)` and `of_layer(weight)` in the places of the parameters."""
    top = {name: of_model(weight) for name, weight in model_weights(config).items()}
    layers = {name: of_layer(weight) for name, weight in layer_weights(config).items()}
    return {"params": {**top, "layers": layers}}


def check_shapes(config: LlamaConfig, params: Mapping) -> None:
    """Raises ValueError, naming a parameter, unless `params` is the tree of a model of `config`."""
    expected = map_weights(config, lambda w: w.shape, lambda w: (config.layers, *w.shape))
    wanted = dict(jax.tree_util.tree_leaves_with_path(expected, is_leaf=lambda node: isinstance(node, tuple)))
    found = {path: tuple(array.shape) for path, array in jax.tree_util.tree_leaves_with_path(params)}
    for path in [*wanted, *found]:
        if wanted.get(path) != found.get(path):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has shape {found.get(path)}, expected {wanted.get(path)}"
            )


def parameter_count(config: LlamaConfig) -> int:
    """Number of parameters, the tied embedding counted once."""
    counts = map_weights(config, lambda w: math.prod(w.shape), lambda w: config.layers * math.prod(w.shape))
    return sum(jax.tree.leaves(counts))
