import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from recycled_jax.config import LlamaConfig
from recycled_jax.hf import load_hf, save_hf
from recycled_jax.sharding import param_shardings
from tests.recycled_jax.parity import families

FAMILIES = sorted(families.CONFIGS)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = 50_000  # bytes: several files for a tiny model


@pytest.fixture
def checkpoint(tmp_path):
    return families.write_checkpoint(tmp_path / "llama", "llama_3.1")


def stored_tensors(folder) -> dict[str, np.ndarray]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_bits_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


def rewrite(folder, change) -> None:
    """`change` gets the dict of tensors of a checkpoint to edit in place."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", FAMILIES)
    def test_bit_exact(self, name, dtype, tmp_path):
        source = families.write_checkpoint(tmp_path / "source", name, DTYPES[dtype])
        model, params = load_hf(source, dtype=None)
        assert model.param_dtype == dtype
        save_hf(tmp_path / "out", model, params)
        assert_bits_equal(stored_tensors(tmp_path / "out"), stored_tensors(source))
        assert LlamaConfig.from_hf(tmp_path / "out") == LlamaConfig.from_hf(source)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype

    @pytest.mark.parametrize("name", ["qwen2", "llama_3.2"])
    def test_bit_exact_in_several_files(self, name, tmp_path):
        source = families.write_checkpoint(tmp_path / "source", name)
        save_hf(tmp_path / "out", *load_hf(source, dtype=None), max_shard_bytes=SMALL)
        files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        expected = stored_tensors(source)
        assert index["weight_map"].keys() == expected.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        for file in files:
            tensors = load_file(tmp_path / "out" / file)
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= SMALL
        save_hf(tmp_path / "again", *load_hf(tmp_path / "out", dtype=None))
        assert_bits_equal(stored_tensors(tmp_path / "again"), expected)

    def test_float32_keeps_bfloat16_values(self, tmp_path):
        source = families.write_checkpoint(tmp_path / "source", "qwen3", ml_dtypes.bfloat16)
        model, params = load_hf(source)
        assert model.dtype == model.param_dtype == jnp.float32
        save_hf(tmp_path / "out", model, params, dtype=jnp.bfloat16)
        assert_bits_equal(stored_tensors(tmp_path / "out"), stored_tensors(source))

    def test_values_reach_the_parameters_by_name(self, checkpoint):
        _, params = load_hf(checkpoint)
        stored = load_file(checkpoint / FILE)
        key = stored["model.layers.1.self_attn.k_proj.weight"]  # [kv_heads * head_dim, embed]
        np.testing.assert_array_equal(params["params"]["layers"]["k_proj"][1][:, 1, 3], key[1 * 16 + 3])
        np.testing.assert_array_equal(params["params"]["lm_head"], stored["lm_head.weight"].T)


class TestMesh:
    @pytest.mark.parametrize("shape", [(4, 2), (1, 1), (2, 1)], ids=str)
    @pytest.mark.parametrize("name", ["llama_3.1", "qwen2", "qwen3", "llama_2"])
    def test_shards_equal_the_whole(self, name, shape, tmp_path):
        folder = families.write_checkpoint(tmp_path, name)
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"))
        model, whole = load_hf(folder)
        _, sharded = load_hf(folder, mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, sharded, whole)
        jax.tree.map(
            lambda array, sharding: self.assert_placed(array, sharding),
            sharded,
            param_shardings(model.config, mesh),
        )

    @staticmethod
    def assert_placed(array, sharding):
        assert array.sharding == sharding
        assert array.addressable_shards[0].data.shape == sharding.shard_shape(array.shape)

    def test_parameters_are_split(self, checkpoint):
        # guards the test above against rules that replicate everything
        mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        _, params = load_hf(checkpoint, mesh=mesh)
        assert params["params"]["layers"]["q_proj"].addressable_shards[0].data.shape == (3, 16, 4, 16)
        assert params["params"]["layers"]["down_proj"].addressable_shards[0].data.shape == (3, 48, 16)

    def test_the_model_runs_on_a_mesh_as_make_mesh_gives_it(self, checkpoint):
        mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
        tokens = jax.numpy.arange(24).reshape(2, 12)
        model, whole = load_hf(checkpoint)
        _, sharded = load_hf(checkpoint, mesh=mesh)
        np.testing.assert_allclose(model.apply(sharded, tokens), model.apply(whole, tokens), atol=1e-4)

    def test_reads_only_the_parts(self, checkpoint, monkeypatch):
        from recycled_jax import hf

        read = []
        original = hf.TensorReader.read

        def spy(self, name, part):
            array = original(self, name, part)
            read.append(array.nbytes)
            return array

        monkeypatch.setattr(hf.TensorReader, "read", spy)
        mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        load_hf(checkpoint, mesh=mesh)
        total = sum(tensor.nbytes for tensor in load_file(checkpoint / FILE).values())
        assert sum(read) == total  # eight devices, and each byte is read once
        assert max(read) == 128 * 64 * 4 // 8  # an eighth of q_proj, the largest

    def test_saves_sharded_parameters(self, checkpoint, tmp_path):
        mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        save_hf(tmp_path / "out", *load_hf(checkpoint, mesh=mesh))
        assert_bits_equal(stored_tensors(tmp_path / "out"), stored_tensors(checkpoint))


class TestRefusals:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist, expected the folder"):
            load_hf(tmp_path / "nowhere")

    def test_name_that_is_not_in_the_cache(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="get it with `hf download nobody/nothing`"):
            load_hf("nobody/nothing")

    def test_file_instead_of_folder(self, checkpoint):
        with pytest.raises(FileNotFoundError, match=r"config\.json' is a file, expected the folder"):
            load_hf(checkpoint / "config.json")

    def test_missing_config(self, checkpoint):
        (checkpoint / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
            load_hf(checkpoint)

    def test_missing_weights(self, checkpoint):
        (checkpoint / FILE).unlink()
        with pytest.raises(FileNotFoundError, match=rf"has neither {FILE} nor {INDEX}"):
            load_hf(checkpoint)

    def test_pickled_weights(self, checkpoint):
        (checkpoint / FILE).rename(checkpoint / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin .*never read, convert them to safetensors"):
            load_hf(checkpoint)

    @pytest.mark.parametrize("kept", [0, 5, 5_000, 100_000])
    def test_truncated_file(self, checkpoint, kept):
        content = (checkpoint / FILE).read_bytes()
        (checkpoint / FILE).write_bytes(content[:kept])
        with pytest.raises(ValueError, match=rf"{FILE} is not a complete safetensors file"):
            load_hf(checkpoint)

    def test_missing_tensor(self, checkpoint):
        rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
        with pytest.raises(
            ValueError, match=r"lacks the tensor model\.layers\.2\.mlp\.up_proj\.weight of shape \(96, 64\)"
        ):
            load_hf(checkpoint)

    def test_missing_head_of_an_untied_model(self, checkpoint):
        rewrite(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
        with pytest.raises(ValueError, match=r"lacks the tensor lm_head\.weight"):
            load_hf(checkpoint)

    def test_wrong_shape(self, checkpoint):
        rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": np.ones(65, np.float32)}))
        with pytest.raises(ValueError, match=r"model\.norm\.weight of shape \(65,\), expected \(64,\)"):
            load_hf(checkpoint)

    def test_wrong_dtype(self, checkpoint):
        rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.int8)}))
        with pytest.raises(ValueError, match=r"model\.norm\.weight of dtype I8, expected one of F32, F16, BF16"):
            load_hf(checkpoint)

    @pytest.mark.parametrize("extra", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.input_layernorm.weight"])
    def test_tensor_that_would_change_the_result(self, checkpoint, extra):
        rewrite(checkpoint, lambda tensors: tensors.update({extra: np.ones(64, np.float32)}))
        with pytest.raises(ValueError, match=f"has the tensor {extra}, which a llama model"):
            load_hf(checkpoint)

    def test_mixed_dtypes_need_a_choice(self, checkpoint):
        rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.float16)}))
        with pytest.raises(ValueError, match=r"dtype=None needs .* F16 \(model\.norm\.weight\), F32"):
            load_hf(checkpoint, dtype=None)
        load_hf(checkpoint, dtype=jnp.float32)

    @pytest.mark.parametrize(
        "content", ["{", "{}", '{"weight_map": {"a": "../secret.safetensors"}}', '{"weight_map": ["a"]}']
    )
    def test_damaged_index(self, checkpoint, content):
        (checkpoint / FILE).unlink()
        (checkpoint / INDEX).write_text(content)
        with pytest.raises(ValueError, match=f"{INDEX} (is not a safetensors index|names the file)"):
            load_hf(checkpoint)

    def test_missing_shard(self, checkpoint, tmp_path):
        save_hf(tmp_path / "out", *load_hf(checkpoint), max_shard_bytes=SMALL)
        shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=rf"{shard.name} does not exist, but {INDEX} names it"):
            load_hf(tmp_path / "out")

    def test_shard_without_its_tensor(self, checkpoint, tmp_path):
        save_hf(tmp_path / "out", *load_hf(checkpoint), max_shard_bytes=SMALL)
        first, second = sorted((tmp_path / "out").glob("*.safetensors"))[:2]
        first.write_bytes(second.read_bytes())
        with pytest.raises(ValueError, match=rf"{first.name} has no tensor model\.embed_tokens\.weight, but"):
            load_hf(tmp_path / "out")


class TestHarmless:
    def test_rotary_buffers_of_old_checkpoints(self, checkpoint):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        rewrite(checkpoint, lambda tensors: tensors.update({name: np.ones(8, np.float32)}))
        load_hf(checkpoint)

    def test_head_of_a_tied_model(self, tmp_path):
        folder = families.write_checkpoint(tmp_path, "llama_3.2")
        rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": np.ones((64, 64), np.float32)}))
        _, params = load_hf(folder)
        assert "lm_head" not in params["params"]


class TestSaving:
    def test_a_failure_leaves_nothing(self, checkpoint, tmp_path):
        class Broken:
            def save_pretrained(self, folder):
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            save_hf(tmp_path / "out", *load_hf(checkpoint), tokenizer=Broken())
        assert [entry.name for entry in tmp_path.iterdir()] == ["llama"]

    def test_a_failure_leaves_the_checkpoint_that_was_there(self, checkpoint, monkeypatch):
        before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
        model, params = load_hf(checkpoint)
        monkeypatch.setattr("recycled_jax.hf.config_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_hf(checkpoint, model, params)
        assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before

    def test_replaces_the_checkpoint_and_nothing_else(self, checkpoint, tmp_path):
        model, params = load_hf(checkpoint)
        save_hf(tmp_path / "out", model, params, max_shard_bytes=SMALL)
        (tmp_path / "out" / "notes.txt").write_text("mine")
        save_hf(tmp_path / "out", model, params)
        names = {"config.json", "generation_config.json", FILE, "notes.txt"}
        assert {file.name for file in (tmp_path / "out").iterdir()} == names
        assert_bits_equal(stored_tensors(tmp_path / "out"), stored_tensors(checkpoint))

    def test_refuses_a_file(self, checkpoint):
        with pytest.raises(FileExistsError, match=r"config\.json is a file, expected a folder"):
            save_hf(checkpoint / "config.json", *load_hf(checkpoint))

    def test_refuses_parameters_of_another_model(self, checkpoint, tmp_path):
        model, _ = load_hf(checkpoint)
        _, params = load_hf(families.write_checkpoint(tmp_path / "other", "llama_2"))
        with pytest.raises(ValueError, match=r"\['k_proj'\] has shape \(3, 64, 4, 16\), expected \(3, 64, 2, 16\)"):
            save_hf(tmp_path / "out", model, params)

    def test_generation_config(self, checkpoint, tmp_path):
        save_hf(tmp_path / "out", *load_hf(checkpoint))
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def test_name_in_the_local_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "hub" / "models--somebody--something"
    families.write_checkpoint(model / "snapshots" / "abc", "llama_2")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    assert load_hf("somebody/something")[0].config == LlamaConfig.from_hf(families.CONFIGS["llama_2"])
