import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from recycled_jax.checkpoint import load_model
from recycled_jax.hf import load_hf
from recycled_jax.orbax_io import is_orbax, load_orbax, save_orbax
from recycled_jax.sharding import param_shardings
from tests.recycled_jax.parity import families


@pytest.fixture
def saved(tmp_path):
    """A folder in orbax format, with the model and parameters that were saved."""
    model, params = load_hf(families.write_checkpoint(tmp_path / "hf", "qwen2", ml_dtypes.bfloat16), dtype=None)
    save_orbax(tmp_path / "orbax", model, params)
    return tmp_path / "orbax", model, params


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def assert_equal(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda array: array.dtype, found) == jax.tree.map(lambda array: array.dtype, expected)


def test_round_trip(saved):
    folder, model, params = saved
    loaded, restored = load_orbax(folder, dtype=None)
    assert loaded == model
    assert loaded.param_dtype == jnp.bfloat16
    assert_equal(restored, params)


def test_casts(saved):
    folder, _, params = saved
    model, restored = load_orbax(folder)
    assert model.dtype == model.param_dtype == jnp.float32
    assert_equal(restored, jax.tree.map(lambda array: array.astype(jnp.float32), params))


def test_onto_a_mesh(saved, mesh):
    folder, model, params = saved
    _, restored = load_orbax(folder, dtype=None, mesh=mesh)
    assert_equal(restored, params)
    assert jax.tree.map(lambda array: array.sharding, restored) == param_shardings(model.config, mesh)


def test_from_a_mesh(saved, mesh, tmp_path):
    folder, model, params = saved
    _, sharded = load_orbax(folder, dtype=None, mesh=mesh)
    save_orbax(tmp_path / "again", model, sharded)
    assert_equal(load_orbax(tmp_path / "again", dtype=None)[1], params)


def test_load_model_takes_either_format(saved, tmp_path):
    folder, _, params = saved
    assert is_orbax(folder) and not is_orbax(tmp_path / "hf")
    assert_equal(load_model(folder, dtype=None)[1], params)
    assert_equal(load_model(tmp_path / "hf", dtype=None)[1], params)


def test_refuses_to_overwrite(saved):
    folder, model, params = saved
    with pytest.raises(ValueError, match="already holds a checkpoint, expected a new folder"):
        save_orbax(folder, model, params)


def test_refuses_parameters_of_another_model(saved, tmp_path):
    _, model, params = saved
    del params["params"]["layers"]["q_bias"]
    with pytest.raises(ValueError, match=r"q_bias.* has shape None"):
        save_orbax(tmp_path / "new", model, params)
    assert not (tmp_path / "new").exists()


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a checkpoint in orbax format"):
        load_orbax(tmp_path)


def test_missing_config(saved):
    folder, _, _ = saved
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_orbax(folder)


def test_config_of_another_model(saved, tmp_path):
    folder, _, _ = saved
    other = families.write_checkpoint(tmp_path / "other", "llama_2")
    (folder / "config.json").write_bytes((other / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"k_proj.* has shape .*, expected"):
        load_orbax(folder)


# orbax leaves coroutines behind when reading fails, and they warn when they are collected
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["metadata", "data", "emptied"])
def test_damaged(saved, damage):
    folder, _, _ = saved
    pattern = {"metadata": "_METADATA", "data": "d/*", "emptied": "*"}[damage]
    for file in (folder / "params").rglob(pattern):
        if file.is_file():
            file.unlink() if damage == "emptied" else file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="params cannot be read as an orbax checkpoint") as raised:
        load_orbax(folder)
    assert len(str(raised.value)) < 1000
    del raised
    gc.collect()
