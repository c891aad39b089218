import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycled_jax.config import MODEL_TYPES, Llama3Rope, LlamaConfig
from tests.recycled_jax.parity.families import CONFIGS

LLAMA = CONFIGS["llama_3.1"]
SCALING = LLAMA["rope_scaling"]
STRETCH = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64)


def test_reads_every_field():
    config = LlamaConfig.from_hf({**LLAMA, "eos_token_id": [2, 3], "pad_token_id": 0, "initializer_range": 0.1})
    assert config == LlamaConfig(
        vocab=64,
        embed=64,
        mlp=96,
        layers=3,
        query_heads=8,
        kv_heads=2,
        head_dim=16,
        model_type="llama",
        norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=STRETCH,
        tie_embeddings=False,
        max_length=512,
        init_std=0.1,
        bos_id=1,
        eos_ids=(2, 3),
        pad_id=0,
    )
    assert config.group == 4


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": SCALING},
        {"rope_theta": 5e5, "rope_scaling": {**SCALING, "type": "llama3"}},
        {"rope_theta": None, "rope_scaling": None, "rope_parameters": {**SCALING, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": SCALING, "rope_parameters": {**SCALING, "rope_theta": 5e5}},
    ],
    ids=["older", "older with type", "newer", "both"],
)
def test_both_forms_of_rotary_settings(rope):
    config = LlamaConfig.from_hf({**LLAMA, **rope})
    assert (config.rope_theta, config.rope_scaling) == (5e5, STRETCH)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
)
def test_unscaled_rotary_settings(rope):
    config = LlamaConfig.from_hf({**CONFIGS["llama_2"], **rope})
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)


def test_defaults_of_old_configs():
    # Llama 2 configs name neither of these
    fields = {name: value for name, value in CONFIGS["llama_2"].items() if name != "num_key_value_heads"}
    config = LlamaConfig.from_hf(fields)
    assert (config.kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10_000.0)


def test_head_dim_of_qwen3_is_not_the_width_divided():
    fields = {name: value for name, value in CONFIGS["qwen3"].items() if name != "head_dim"}
    assert LlamaConfig.from_hf(fields).head_dim == 128


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, r"model_type='lama' is not supported.*did you mean 'llama'"),
        ({"model_type": None}, "model_type=None is not supported, expected one of llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias=True, only False"),
        ({"mlp_bias": True}, "mlp_bias=True, only False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, only 1.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"sliding_window": 4096}, "sliding_window=4096, only models without"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with 'sliding_attention'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn', supported are"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type='dynamic'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' without low_freq_factor"),
        ({"rope_scaling": {**SCALING, "factor": 0.5}}, "factor=0.5 must be at least 1"),
        ({"rope_scaling": {**SCALING, "low_freq_factor": 4.0}}, "low_freq_factor=4.0 must be below"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"num_key_value_heads": 3}, "query_heads=8 must be a multiple of kv_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"num_hidden_layers": 0}, "layers=0 must be at least 1"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf({**LLAMA, **fields})


def test_a_mistral_config_without_a_window_means_the_default_one():
    fields = {name: value for name, value in CONFIGS["mistral"].items() if name != "sliding_window"}
    with pytest.raises(ValueError, match="sliding_window=4096, only models without"):
        LlamaConfig.from_hf(fields)


def test_the_switched_off_window_of_qwen2_is_no_window():
    LlamaConfig.from_hf({**CONFIGS["qwen2"], "use_sliding_window": False, "sliding_window": 4096})


def test_reads_a_folder_and_a_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert LlamaConfig.from_hf(tmp_path) == LlamaConfig.from_hf(tmp_path / "config.json") == LlamaConfig.from_hf(LLAMA)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        LlamaConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        LlamaConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected a JSON object"):
        LlamaConfig.from_hf(tmp_path)


ids = st.none() | st.integers(0, 9)
positive = st.floats(1e-9, 1e9)
ropes = st.none() | st.builds(
    Llama3Rope,
    factor=st.floats(1, 64),
    low_freq_factor=st.floats(0.5, 1),
    high_freq_factor=st.floats(2, 8),
    original_length=st.integers(1, 10_000),
)


@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    half=st.integers(1, 64),
    fields=st.fixed_dictionaries(
        {
            "vocab": st.integers(1, 10**6),
            "embed": st.integers(1, 10**5),
            "mlp": st.integers(1, 10**5),
            "layers": st.integers(1, 200),
            "model_type": st.sampled_from(MODEL_TYPES),
            "norm_eps": positive,
            "rope_theta": positive,
            "rope_scaling": ropes,
            "tie_embeddings": st.booleans(),
            "max_length": st.integers(1, 10**7),
            "init_std": positive,
            "bos_id": ids,
            "eos_ids": st.lists(st.integers(0, 9)).map(tuple),
            "pad_id": ids,
        }
    ),
)
def test_round_trip(kv_heads, group, half, fields):
    config = LlamaConfig(query_heads=kv_heads * group, kv_heads=kv_heads, head_dim=2 * half, **fields)
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
