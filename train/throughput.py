"""How much of a chip a run uses: tokens per second and model FLOP utilisation."""

from recycled_jax.config import LlamaConfig
from recycled_jax.weights import parameter_count

# bfloat16 operations per second of one JAX device, by the beginning of its kind's name; the makers' figures, dense
_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak(kind: str) -> float | None:
    """Of a device kind; None where it is not known, as for CPUs."""
    return next((rate for name, rate in _PEAK.items() if kind.startswith(name)), None)


def model_flops(config: LlamaConfig, length: int) -> float:
    """Operations per token of a training step on sequences of `length` tokens: six for every weight that multiplies,
    and causal attention. Nothing that is computed twice (PaLM, arXiv 2204.02311, appendix B)."""
    table = 0 if config.tie_embeddings else config.vocab * config.embed
    multiplying = parameter_count(config) - table
    attention = 12 * config.layers * config.query_heads * config.head_dim * length / 2
    return 6 * multiplying + attention


def utilisation(config: LlamaConfig, length: int, tokens_per_second: float, kind: str, devices: int) -> float | None:
    """Of the devices' peak; None where that is not known."""
    rate = peak(kind)
    return None if rate is None else model_flops(config, length) * tokens_per_second / (rate * devices)
