"""AttentionPredictor against its oracle, with averages and with its network; what its history holds."""

from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save_file

from pallas_kernels import from_heads, gather_attention
from recycled_jax.frame import Here, Token
from recycled_jax.policies.attention_predictor import WEIGHTS, attention_predictor, read_weights, row_weights
from tests.recycled_jax.policies.attention_predictor_numpy import (
    ConvPredictor,
    NumpyAttentionPredictor,
    exponential_average,
)
from tests.recycled_jax.policies.infllm_numpy import middle_blocks
from tests.recycled_jax.policies.numpy_llama import NumpyPolicy, best, softmax
from tests.recycled_jax.policies.record import (
    ALL_SHARE,
    ONE_TO_ONE,
    assert_equals_oracle,
    assert_rows_alone,
    dense_tokens,
    run,
)
from tests.recycled_jax.random_model import prompts

NEW = 14
# one row fills the chunks, so that all batches have one shape
ROWS = st.lists(st.integers(1, 32), min_size=3, max_size=3).map(lambda lengths: prompts(32, *lengths))
KNOBS: dict[str, Any] = {"block": 4, "sinks": 3, "recent": 5, "history": 6, "calibration": 3}


@pytest.fixture
def weights(tmp_path):
    """A file of random weights, and the oracle's network with the same."""
    rng = np.random.default_rng(0)
    arrays = {name: np.asarray(0.3 * rng.normal(size=shape), np.float32) for name, shape in WEIGHTS.items()}
    arrays["decay"] = np.array(0.8, np.float32)
    save_file(arrays, tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors"), ConvPredictor(arrays)


@pytest.mark.parametrize("config", [ONE_TO_ONE, ALL_SHARE], ids=["group 1", "group 4"])
@settings(max_examples=3, deadline=None, derandomize=True)
@given(rows=ROWS, k=st.sampled_from([13, 20]))
def test_averages_equal_the_oracle(config, rows, k):
    policy = attention_predictor(k, **KNOBS, decay=0.8, dense_layers=(1,))
    oracle = {"k": k, **KNOBS, "predict": exponential_average(0.8), "dense_layers": (1,)}
    assert_equals_oracle(policy, lambda: NumpyAttentionPredictor(**oracle), rows, NEW, config)


def test_the_network_equals_the_oracle(weights):
    path, network = weights
    policy = attention_predictor(16, **KNOBS, predictor="cnn", weights=path)
    oracle = {"k": 16, **KNOBS, "predict": network}
    assert_equals_oracle(policy, lambda: NumpyAttentionPredictor(**oracle), prompts(32, 29, 21, 1), NEW)


def test_the_network_has_the_papers_size():
    """But for the decay, which is ours: weights without one average all rows alike."""
    assert sum(int(np.prod(shape)) for name, shape in WEIGHTS.items() if name != "decay") == 4833


def test_weights_of_the_papers_network_average_all_rows_alike(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {name: np.asarray(0.3 * rng.normal(size=shape), np.float32) for name, shape in WEIGHTS.items()}
    save_file({**arrays, "decay": np.array(1, np.float32)}, tmp_path / "ours.safetensors")
    del arrays["decay"]
    save_file(arrays, tmp_path / "papers.safetensors")
    ours, papers = (read_weights(str(tmp_path / f"{name}.safetensors")) for name in ("ours", "papers"))
    assert papers.keys() == ours.keys() and papers["decay"] == ours["decay"]
    np.testing.assert_allclose(row_weights(float(papers["decay"]), 7), np.full(7, 1 / 7), rtol=1e-6)


class _BlocksOfThePreviousRow(NumpyPolicy):
    """Blocks by their largest probability for the previous token, which looked at everything."""

    def __init__(self):
        self.selected, self.rows = {}, {}

    def prompt_attention(self, layer):
        self.look(layer)
        return layer.attend(layer.q[-1], layer.everything())

    def attention(self, layer, step):
        held = []
        for head in range(layer.config.kv_heads):
            blocks = middle_blocks(layer.length, block=4, sinks=3, recent=5)
            heads = range(head * layer.config.group, (head + 1) * layer.config.group)
            seen = self.rows[layer.number]
            scores = [max(seen[q][slot] for q in heads for slot in self.whole(slots, seen)) for slots in blocks]
            kept = {*range(3), *range(layer.length - 5, layer.length)}
            kept |= {slot for place in best(scores, (16 - 8) // 4) for slot in blocks[place]}
            held.append(sorted(kept) if layer.length > 16 else list(range(layer.length)))
        self.selected.setdefault(layer.number, []).append(held)
        self.look(layer)
        return layer.attend(layer.q[-1], held)

    def look(self, layer):
        heads = range(layer.config.query_heads)
        self.rows[layer.number] = [layer.probabilities(layer.q[-1][h], h, range(layer.length)) for h in heads]

    @staticmethod
    def whole(slots, seen):
        """All slots of a block that there were."""
        first = slots[0] // 4 * 4
        return range(first, min(first + 4, len(seen[0])))


def test_one_exact_row_is_the_previous_steps_top_k():
    knobs: dict[str, Any] = {**KNOBS, "history": 1, "calibration": 1}
    policy = attention_predictor(16, **knobs, decay=1.0)
    assert_equals_oracle(policy, _BlocksOfThePreviousRow, prompts(32, 7, 21, 1), NEW)


@pytest.mark.parametrize("calibration", [1, 3])
def test_calibrating_steps_store_exact_rows_and_attend_the_selection(calibration):
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 1, 2, 24, 8)).astype(np.float32)
    queries = rng.normal(size=(4, 4, 8)).astype(np.float32)
    cache = from_heads("head_major", jnp.asarray(keys), jnp.asarray(values))
    method = attention_predictor(12, **KNOBS | {"calibration": calibration}).method
    history = jnp.zeros((1, 1, 4, 6, 6))
    for step, q in enumerate(queries, start=1):
        length = 20 + step
        token = Token(jnp.asarray(q)[None], jnp.asarray(q)[None], *jnp.asarray([keys, values])[:, :, :, length - 1])
        here = Here(jnp.int32(0), jnp.array([length]), jnp.int32(step), jnp.array([True]))
        attended = method.attend("select", token, cache, history, (), here)
        history = attended.state
        newest, positions = history[0, 0, :, -1], attended.positions
        assert positions is not None and jnp.sum(positions[0, 0] >= 0) <= 12
        for head in range(4):
            p = np.zeros(24)
            p[:length] = softmax(keys[0, head // 2, :length] @ q[head] / np.sqrt(8))
            exact = p.reshape(6, 4).max(axis=1)
            if step % calibration == 0:
                np.testing.assert_allclose(newest[head], exact, atol=1e-6)
            else:
                assert (newest[head] == 0).any() and exact.all()
        only_selected = gather_attention(token.q, cache, positions)
        np.testing.assert_allclose(attended.output, only_selected, atol=1e-6)


def test_a_budget_above_the_length_is_full_attention():
    rows = prompts(32, 7, 21, 1)
    assert run(attention_predictor(46, **KNOBS), rows, NEW)[0].tokens == dense_tokens(rows, NEW)


def test_a_row_of_a_batch_is_the_row_alone():
    policy, rows = attention_predictor(13, **KNOBS, decay=0.8, dense_layers=(1,)), prompts(32, 7, 21, 1)
    assert_rows_alone(policy, rows, NEW, (0, 2), ALL_SHARE)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 130}, r"k=130 leaves no room for a block"),
        ({"history": 0}, r"history=0 must be at least 1 row"),
        ({"calibration": 0}, r"calibration=0 must be at least 1"),
        ({"decay": 0.0}, r"decay=0.0 must be above 0 and at most 1"),
    ],
    ids=str,
)
def test_knobs_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        attention_predictor(**knobs)


def test_a_network_needs_weights_of_its_shape(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.safetensors' is not there; python -m train"):
        attention_predictor(predictor="cnn", weights=str(tmp_path / "none.safetensors"))
    save_file({"conv1": np.zeros((3, 3, 1, 8), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds \{'conv1': \(3, 3, 1, 8\)\}, expected"):
        attention_predictor(predictor="cnn", weights=str(tmp_path / "other.safetensors"))
