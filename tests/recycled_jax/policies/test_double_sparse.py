"""DoubleSparse against its oracle, exact top-k and full attention; its tables of channels."""

import hypothesis.strategies as st
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save_file

from recycled_jax.frame import LayerPlan
from recycled_jax.policies.double_sparse import (
    ChannelTable,
    calibrate,
    calibrate_on_texts,
    double_sparse,
    load_table,
    save_table,
)
from tests.recycled_jax.policies.double_sparse_numpy import NumpyDoubleSparse, channel_strengths
from tests.recycled_jax.policies.numpy_llama import Full, NumpyLlama
from tests.recycled_jax.policies.record import ALL_SHARE, ONE_TO_ONE, assert_equals_oracle, dense_tokens, run, run_on
from tests.recycled_jax.policies.top_k_numpy import NumpyTopK
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

GROUPS = pytest.mark.parametrize("config", [ONE_TO_ONE, ALL_SHARE], ids=["group 1", "group 4"])
LENGTHS = st.lists(st.integers(1, 32), min_size=3, max_size=3)
NEW = 10
RAGGED = prompts(33, 2, 18)

EVERYWHERE = ()  # no dense layers


@GROUPS
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    lengths=LENGTHS,
    knobs=st.sampled_from(
        [
            {"k": 4, "reduction": 4, "dense_layers": EVERYWHERE},
            {"k": 8, "reduction": 2, "label_bits": 4, "dense_layers": (0,)},
        ]
    ),
)
def test_equals_the_oracle(config, lengths, knobs):
    assert_equals_oracle(double_sparse(**knobs), lambda: NumpyDoubleSparse(**knobs), prompts(*lengths), NEW, config)


def test_with_a_table_equals_the_oracle(tmp_path):
    ranking = np.array([[np.random.default_rng(layer).permutation(8)] for layer in range(3)])
    save_table(ChannelTable.of(ranking), tmp_path / "table.safetensors")
    policy = double_sparse(4, reduction=4, table=str(tmp_path / "table.safetensors"), dense_layers=EVERYWHERE)

    def oracle():
        return NumpyDoubleSparse(k=4, table=ranking[:, :, :2].tolist(), dense_layers=EVERYWHERE)

    assert_equals_oracle(policy, oracle, RAGGED, NEW, ALL_SHARE)


def test_calibration_ranks_channels_by_their_products():
    model, params = tiny_model()
    blocks = np.array(prompts(24, 24))
    strengths = np.zeros((CONFIG.layers, CONFIG.kv_heads, CONFIG.head_dim))
    for block in blocks:
        llama = NumpyLlama(CONFIG, params, Full())
        llama.generate(block.tolist(), 1)
        strengths += [channel_strengths(layer) for layer in llama.layers]
    table = calibrate(model, params, blocks)
    assert table.ranking.tolist() == np.argsort(-strengths, axis=-1).tolist()

    # texts are packed: three of 20 tokens make two blocks of 24, and 12 tokens are left out
    texts = [
        ",".join(map(str, part))
        for part in (blocks.ravel()[:20], blocks.ravel()[20:40], [*blocks.ravel()[40:], *range(12)])
    ]

    def encode(text):
        return [int(number) for number in text.split(",")]

    assert calibrate_on_texts(model, params, encode, texts, block=24) == table
    with pytest.raises(ValueError, match="texts have 20 tokens, expected at least one block of 24"):
        calibrate_on_texts(model, params, encode, texts[:1], block=24)
    with pytest.raises(ValueError, match="blocks is empty"):
        calibrate(model, params, blocks[:0])


def test_all_channels_are_exact_top_k_and_few_are_not():
    def top_k():
        return NumpyTopK(k=4)

    everything = double_sparse(4, reduction=1, dense_layers=EVERYWHERE)
    assert_equals_oracle(everything, top_k, RAGGED, NEW, ALL_SHARE)
    few = double_sparse(4, reduction=4, dense_layers=EVERYWHERE)
    with pytest.raises(AssertionError):
        assert_equals_oracle(few, top_k, RAGGED, NEW, ALL_SHARE)


def test_labels_are_a_slice_of_the_keys():
    policy = double_sparse(4, reduction=4, dense_layers=EVERYWHERE)
    state, _ = run_on(policy, RAGGED, prompts(5, 5, 5, seed=3), ALL_SHARE)
    assert state.cache is not None
    for layer in range(ALL_SHARE.layers):
        for row, length in enumerate(np.asarray(state.lengths)):
            keys = np.asarray(state.cache.keys(layer))[row, 0, :length]
            channels = np.asarray(state.kept.channels)[layer, row, 0]
            np.testing.assert_array_equal(state.kept.labels[layer, row, 0, :length], keys[:, channels])


def test_a_budget_above_the_length_is_full_attention_and_a_small_one_is_not():
    dense = dense_tokens(RAGGED, NEW, ALL_SHARE)
    assert run(double_sparse(64, reduction=4, dense_layers=EVERYWHERE), RAGGED, NEW, ALL_SHARE)[0].tokens == dense
    assert run(double_sparse(4, reduction=4, dense_layers=EVERYWHERE), RAGGED, NEW, ALL_SHARE)[0].tokens != dense


def test_a_row_of_a_batch_is_the_row_without_padding():
    together, selections = run(double_sparse(4, reduction=4, dense_layers=EVERYWHERE), RAGGED, NEW, ALL_SHARE)
    alone, selections_alone = run(
        double_sparse(4, reduction=4, dense_layers=EVERYWHERE), RAGGED[1:2] * 3, NEW, ALL_SHARE
    )
    assert alone.tokens == together.tokens[1:2] * 3 and selections_alone == selections[1:2] * 3


def test_reads_a_share_of_the_keys():
    policy = double_sparse(8, reduction=2, label_bits=4, dense_layers=(0,))
    telemetry = run(policy, RAGGED, NEW, ALL_SHARE)[0].telemetry
    np.testing.assert_array_equal(telemetry.scored[0], [[0] * 3, *[[34 / 8, 3 / 8, 19 / 8]] * 2])


def test_the_papers_two_dense_layers_are_the_default():
    assert double_sparse().method.plan == LayerPlan(dense=(0, 1))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"reduction": 0}, "reduction=0 must be at least 1"),
        ({"label_bits": 8}, "label_bits=8 must be one of 4, 16"),
    ],
    ids=str,
)
def test_refuses(knobs, message, monkeypatch):
    # a user has no annotation checks that would come first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        double_sparse(**knobs)


def test_refuses_what_does_not_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match="reduction=3 does not divide head_dim=8 of the model"):
        run(double_sparse(6, reduction=3), RAGGED, NEW, ALL_SHARE)
    path = tmp_path / "table.safetensors"
    save_table(ChannelTable.of(np.tile(np.arange(8), (3, 2, 1))), path)
    with pytest.raises(
        ValueError, match=r"table has \(layers, kv_heads, head_dim\) = \(3, 2, 8\), the model has \(3, 1, 8"
    ):
        run(double_sparse(6, reduction=4, table=str(path)), RAGGED, NEW, ALL_SHARE)


def test_refuses_files_that_hold_no_table(tmp_path):
    path = tmp_path / "table.safetensors"
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_table(path)
    path.write_text("no table")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_table(path)
    save_file({"something": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="has no tensor 'ranking', only something"):
        load_table(path)
    save_file({"ranking": np.zeros((1, 1, 4), np.int16)}, path)
    with pytest.raises(ValueError, match=r"ranking, of shape \(1, 1, 4\), is not every channel once"):
        load_table(path)
