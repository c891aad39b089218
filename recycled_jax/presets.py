"""Sizes of published models by name, as their `config.json` on the Hugging Face hub gives them: for planning, without a
checkpoint."""

from dataclasses import replace

from recycled_jax.config import Llama3Rope, LlamaConfig

_LLAMA_8B = LlamaConfig(
    vocab=128_256,
    embed=4096,
    mlp=14_336,
    layers=32,
    query_heads=32,
    kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
    rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192),
    max_length=131_072,
    bos_id=128_000,
    eos_ids=(128_001, 128_008, 128_009),
)
_LLAMA_70B = replace(_LLAMA_8B, embed=8192, mlp=28_672, layers=80, query_heads=64)
_LLAMA_1B = replace(
    _LLAMA_8B,
    embed=2048,
    mlp=8192,
    layers=16,
    head_dim=64,
    rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192),
    tie_embeddings=True,
)
_LLAMA_3B = replace(_LLAMA_1B, embed=3072, layers=28, query_heads=24, head_dim=128)
_QWEN2_7B = LlamaConfig(
    model_type="qwen2",
    vocab=152_064,
    embed=3584,
    mlp=18_944,
    layers=28,
    query_heads=28,
    kv_heads=4,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=1e6,
    max_length=131_072,
    bos_id=151_643,
    eos_ids=(151_643,),
)

PRESETS = {
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.1-70b": _LLAMA_70B,
    "llama-3.2-1b": _LLAMA_1B,
    "llama-3.2-3b": _LLAMA_3B,
    "qwen2-7b": _QWEN2_7B,
}
