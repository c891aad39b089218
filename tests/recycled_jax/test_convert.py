import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from recycled_jax.commands.convert import convert
from recycled_jax.config import LlamaConfig
from recycled_jax.orbax_io import is_orbax, load_orbax
from tests.recycled_jax.parity import families

FAMILIES = sorted(families.CONFIGS)


@pytest.fixture
def source(tmp_path):
    folder = families.write_checkpoint(tmp_path / "source", "llama_3.1", ml_dtypes.bfloat16)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return folder


def assert_same_tensors(one, other) -> None:
    found, expected = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_bit_exact(name, dtype, tmp_path):
    source = families.write_checkpoint(tmp_path / "source", name, dtype)
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert is_orbax(tmp_path / "orbax") and not is_orbax(tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)
    assert LlamaConfig.from_hf(tmp_path / "back") == LlamaConfig.from_hf(source)


def test_carries_the_other_files(source, tmp_path):
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_says_what_it_wrote(source, tmp_path, capsys):
    convert(source, tmp_path / "orbax")
    count = sum(tensor.size for tensor in load_file(source / "model.safetensors").values())
    printed = capsys.readouterr()
    assert printed.err == f"converting {source} to orbax …\n"
    assert printed.out == f"wrote {tmp_path / 'orbax'}: {count:,} parameters in bfloat16\n"
    convert(tmp_path / "orbax", tmp_path / "back")
    assert capsys.readouterr().err == f"converting {tmp_path / 'orbax'} to Hugging Face …\n"


def test_dtype(source, tmp_path):
    convert(source, tmp_path / "orbax", dtype="float32")
    model, _ = load_orbax(tmp_path / "orbax", dtype=None)
    assert model.param_dtype == np.float32


def test_refuses_a_folder_that_is_not_empty(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out' exists and is not empty; name a new folder or give --overwrite"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", overwrite=True)
    assert is_orbax(tmp_path / "out") and (tmp_path / "out" / "mine.txt").exists()


def test_takes_an_empty_folder(source, tmp_path):
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    assert is_orbax(tmp_path / "out")


def test_overwriting_leaves_one_format(source, tmp_path):
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "out")
    convert(source, tmp_path / "out", overwrite=True)
    assert is_orbax(tmp_path / "out") and not (tmp_path / "out" / "model.safetensors").exists()


def test_a_damaged_source_leaves_nothing(source, tmp_path):
    (source / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        convert(source, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_missing_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
