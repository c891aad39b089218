"""Model FLOP utilisation, by hand."""

import pytest

from recycled_jax.config import LlamaConfig
from train.throughput import model_flops, peak, utilisation

CONFIG = LlamaConfig(vocab=10, embed=8, mlp=16, layers=2, query_heads=2, kv_heads=1, head_dim=4, tie_embeddings=False)


def test_operations_per_token():
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 10  # layers and the head; the table is looked up
    vectors = 2 * 2 * 8 + 8
    attention = 2 * 2 * 2 * 4 * 100 / 2  # queries by keys and by values, half of the square, in two layers of two heads
    assert model_flops(CONFIG, 100) == pytest.approx(6 * (matrices + vectors) + 3 * 2 * attention)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA H200", 989e12), ("cpu", None)],
)
def test_peaks(kind, rate):
    assert peak(kind) == rate


def test_utilisation():
    flops = model_flops(CONFIG, 100)
    assert utilisation(CONFIG, 100, 4 * 197e12 / flops, "TPU v5 lite", 8) == pytest.approx(0.5)
    assert utilisation(CONFIG, 100, 1.0, "cpu", 8) is None
