import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from recycled_jax.config import LlamaConfig
from recycled_jax.model import Llama
from recycled_jax.weights import Weight, check_shapes, layer_weights, model_weights, parameter_count
from tests.recycled_jax.parity import families

FAMILIES = sorted(families.CONFIGS)


@pytest.mark.parametrize("name", FAMILIES)
def test_tables_name_every_tensor_of_a_checkpoint(name):
    config = LlamaConfig.from_hf(families.CONFIGS[name])
    ours = {weight.hf: weight.hf_shape for weight in model_weights(config).values()}
    for layer in range(config.layers):
        ours |= {f"model.layers.{layer}.{weight.hf}": weight.hf_shape for weight in layer_weights(config).values()}
    assert ours == families.shapes(families.CONFIGS[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_the_tables(name):
    config = LlamaConfig.from_hf(families.CONFIGS[name])
    params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    check_shapes(config, params)
    counted = sum(np.prod(shape) for shape in families.shapes(families.CONFIGS[name]).values())
    assert parameter_count(config) == counted == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_layout_by_hand():
    # 2 inputs, 2 heads of 2 channels: row `head * 2 + channel` of the stored matrix is our [:, head, channel]
    weight = Weight((2, 2, 2), ("embed", "kv_heads", "head_dim"), "k", nn.initializers.zeros, 1)
    stored = np.array([[0, 1], [10, 11], [20, 21], [30, 31]])
    assert weight.hf_shape == (4, 2)
    np.testing.assert_array_equal(weight.from_hf(stored), [[[0, 10], [20, 30]], [[1, 11], [21, 31]]])


def test_layout_of_two_input_dimensions_by_hand():
    # column `head * 2 + channel` of the stored matrix is row [head, channel] of ours
    weight = Weight((2, 2, 1), ("query_heads", "head_dim", "embed"), "o", nn.initializers.zeros, 2)
    assert weight.hf_shape == (1, 4)
    np.testing.assert_array_equal(weight.from_hf(np.array([[0, 1, 2, 3]])), [[[0], [1]], [[2], [3]]])


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_invert(name):
    config = LlamaConfig.from_hf(families.CONFIGS[name])
    for weight in [*model_weights(config).values(), *layer_weights(config).values()]:
        stored = np.random.RandomState(0).standard_normal(weight.hf_shape)
        back = weight.to_hf(weight.from_hf(stored))
        np.testing.assert_array_equal(back, stored)
        assert back.flags.c_contiguous


def test_check_shapes_names_the_parameter():
    config = LlamaConfig.from_hf(families.CONFIGS["llama_2"])
    params = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params["params"]["layers"]["q_proj"] = jnp.zeros((3, 64, 5, 16))
    with pytest.raises(ValueError, match=r"q_proj.* has shape \(3, 64, 5, 16\), expected \(3, 64, 4, 16\)"):
        check_shapes(config, params)
    del params["params"]["layers"]["q_proj"]
    with pytest.raises(ValueError, match=r"q_proj.* has shape None"):
        check_shapes(config, params)
