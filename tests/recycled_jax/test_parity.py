"""Logits equal those of transformers, in float32, for every family (identity 6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recycled_jax.config import LlamaConfig
from recycled_jax.decode import decode_step, prefill
from recycled_jax.hf import load_hf, save_hf
from recycled_jax.policies import make_policy
from recycled_jax.rope import frequencies
from tests.recycled_jax.parity import families

TOLERANCE = 1e-4
FAMILIES = sorted(families.CONFIGS)


def our_logits(folder, tokens) -> np.ndarray:
    model, params = load_hf(folder)
    return np.asarray(model.apply(params, jnp.asarray(tokens)))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_match_the_golden_files(name, tmp_path):
    ours = our_logits(families.write_checkpoint(tmp_path, name), families.tokens(name))
    expected = families.golden(name)
    assert expected.std() > 0.5  # the comparison means something
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_after_a_prefill_matches_the_golden_files(name, tmp_path):
    model, params = load_hf(families.write_checkpoint(tmp_path, name))
    tokens, expected = families.tokens(name), families.golden(name)
    prompt, policy = np.array([24, 9], np.int32), make_policy("full")
    padded = np.zeros((2, 32), np.int32)
    for row, length in enumerate(prompt):
        padded[row, :length] = tokens[row, :length]
    # chunks of 8, so that the longer prompt takes three and its row's last token stands in another chunk
    logits, state = jax.jit(
        lambda params, tokens, lengths: prefill(model, params, tokens, lengths, policy=policy, capacity=64, chunk=8)
    )(params, padded, prompt)
    step = jax.jit(lambda params, state, token: decode_step(model, params, state, token, policy=policy)[:2])
    for taken in range(24):
        for row, length in enumerate(prompt + taken):
            np.testing.assert_allclose(logits[row], expected[row, length - 1], rtol=0, atol=TOLERANCE)
        token = jnp.asarray([tokens[row, length] for row, length in enumerate(prompt + taken)])
        logits, state = step(params, state, token)


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_matter(name, tmp_path):
    # guards the parity test against a model in which rotary embeddings have no effect on the logits
    model, params = load_hf(families.write_checkpoint(tmp_path, name))
    tokens = jnp.asarray(families.tokens(name))
    stretched = 2 * jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    difference = model.apply(params, tokens, stretched) - model.apply(params, tokens)
    assert jnp.abs(difference).max() > 100 * TOLERANCE


@pytest.fixture
def make_golden():
    """The generator of the golden files, when torch is there."""
    pytest.importorskip("torch")
    from tests.recycled_jax.parity import make_golden

    return make_golden


@pytest.mark.filterwarnings("default")  # torch and its integrations warn about themselves, differently by version
@pytest.mark.parametrize("name", FAMILIES)
class TestLive:
    def test_golden_files_are_what_transformers_computes(self, name, make_golden):
        logits = make_golden.torch_logits(make_golden.torch_model(name), families.tokens(name))
        np.testing.assert_allclose(families.golden(name), logits, rtol=0, atol=TOLERANCE)

    def test_loads_what_transformers_saves(self, name, make_golden, tmp_path):
        make_golden.torch_model(name).save_pretrained(tmp_path)
        assert "rope_parameters" in (tmp_path / "config.json").read_text()  # the newer form of the config
        ours = our_logits(tmp_path, families.tokens(name))
        np.testing.assert_allclose(ours, families.golden(name), rtol=0, atol=TOLERANCE)

    def test_transformers_loads_what_we_save(self, name, make_golden, tmp_path):
        from transformers import AutoModelForCausalLM

        model, params = load_hf(families.write_checkpoint(tmp_path / "theirs", name))
        save_hf(tmp_path / "ours", model, params)
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        logits = make_golden.torch_logits(loaded.eval(), families.tokens(name))
        np.testing.assert_allclose(logits, families.golden(name), rtol=0, atol=TOLERANCE)

    def test_rotary_frequencies_are_equal(self, name, make_golden):
        # at 100,000 tokens, two units in the last place are an error of 0.01 radians
        theirs = make_golden.torch_model(name).model.rotary_emb.inv_freq.numpy()
        ours = frequencies(LlamaConfig.from_hf(families.CONFIGS[name]))
        np.testing.assert_array_max_ulp(ours, theirs, maxulp=1)
