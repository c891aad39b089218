"""Tiny random checkpoints of every supported family: configs, tensors and tokens, the same on every machine.

Shapes and names are written out from Hugging Face's model code and not taken from `recycled_jax.weights`, so
that the tests compare with something of its own.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TOKENS = 48  # of each of the two rows
_COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# head_dim 16 and these lengths put one frequency in each of the three regimes: kept, blended, stretched
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _family(model_type: str, query_heads: int, kv_heads: int, **fields) -> dict:
    heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
    return {"model_type": model_type, **_COMMON, **heads, **fields}


# As published: rotary settings in the older form, `head_dim` and biases where the family's own configs have
# them.
CONFIGS: dict[str, dict] = {
    "llama_2": _family("llama", 4, 4, rms_norm_eps=1e-5, rope_scaling=None, tie_word_embeddings=False),
    "llama_3": _family("llama", 4, 2, rms_norm_eps=1e-5, rope_theta=500000.0, attention_bias=False, mlp_bias=False),
    "llama_3.1": _family("llama", 8, 2, rms_norm_eps=1e-5, rope_theta=500000.0, head_dim=16, rope_scaling=_LLAMA3_ROPE),
    "llama_3.2": _family(
        "llama",
        4,
        1,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=_LLAMA3_ROPE,
        tie_word_embeddings=True,
    ),
    "mistral": _family("mistral", 4, 2, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None),
    "qwen2": _family(
        "qwen2", 4, 2, rms_norm_eps=1e-6, rope_theta=1000000.0, use_sliding_window=False, sliding_window=4096
    ),
    "qwen2_tied": _family("qwen2", 4, 1, rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=True),
    "qwen3": _family("qwen3", 4, 2, rms_norm_eps=1e-6, rope_theta=1000000.0, head_dim=32, attention_bias=False),
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Hugging Face name → shape of every tensor of a checkpoint."""
    vocab, embed, mlp = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", embed // config["num_attention_heads"])
    query, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer = {
        "input_layernorm.weight": (embed,),
        "self_attn.q_proj.weight": (query, embed),
        "self_attn.k_proj.weight": (kv, embed),
        "self_attn.v_proj.weight": (kv, embed),
        "self_attn.o_proj.weight": (embed, query),
        "post_attention_layernorm.weight": (embed,),
        "mlp.gate_proj.weight": (mlp, embed),
        "mlp.up_proj.weight": (mlp, embed),
        "mlp.down_proj.weight": (embed, mlp),
    }
    if config["model_type"] == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (width,) for name, width in (("q", query), ("k", kv), ("v", kv))}
    if config["model_type"] == "qwen3":
        layer |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in ("q", "k")}
    layers = range(config["num_hidden_layers"])
    all_shapes = {"model.embed_tokens.weight": (vocab, embed), "model.norm.weight": (embed,)}
    all_shapes |= {f"model.layers.{n}.{name}": shape for n in layers for name, shape in layer.items()}
    if not config.get("tie_word_embeddings"):
        all_shapes["lm_head.weight"] = (vocab, embed)
    return all_shapes


def tensors(name: str) -> dict[str, np.ndarray]:
    """The float32 tensors of family `name`: large enough that every part of the model shows in the logits."""
    made = {}
    for tensor, shape in shapes(CONFIGS[name]).items():
        noise = _random(f"{name}/{tensor}").standard_normal(shape)
        made[tensor] = (0.3 * noise + 1 if "norm" in tensor else 0.15 * noise).astype(np.float32)
    return made


def tokens(name: str) -> np.ndarray:
    """int32 `[2, TOKENS]`."""
    return _random(f"{name}/tokens").randint(0, _COMMON["vocab_size"], (2, TOKENS)).astype(np.int32)


def write_checkpoint(folder: Path, name: str, dtype=np.float32, **fields) -> Path:
    """The checkpoint of family `name` in one file of `dtype`; `fields` replace those of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[name], **fields}))
    cast = {tensor: array.astype(dtype) for tensor, array in tensors(name).items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def golden(name: str) -> np.ndarray:
    """The logits `[2, TOKENS, vocab]` that transformers computed (`make_golden`)."""
    return np.load(Path(__file__).parent / "golden" / f"{name}.npy")


def _random(text: str) -> np.random.RandomState:
    # RandomState, because its streams are frozen: default_rng's may change between numpy releases
    return np.random.RandomState(zlib.crc32(text.encode()))
