import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recycled_jax.hf import load_hf, save_hf
from recycled_jax.tokenizer import load_tokenizer
from tests.recycled_jax.parity import families


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")


def test_saved_beside_the_weights_and_loaded_again(tokenizer, tmp_path):
    save_hf(tmp_path / "out", *load_hf(families.write_checkpoint(tmp_path / "in", "llama_2")), tokenizer=tokenizer)
    loaded = load_tokenizer(tmp_path / "out")
    assert loaded.encode("hello world") == [2, 3]
    assert loaded.eos_token_id == 1


def test_splits_numbers_as_its_file_says_whatever_the_model_type(tmp_path):
    core = Tokenizer(models.BPE({"1": 0, "2": 1, "12": 2}, [("1", "2")]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{N}{1,2}"), behavior="isolated")
    two_digits = PreTrainedTokenizerFast(tokenizer_object=core)
    # a class that transformers has for this type would split numbers into single digits
    folder = families.write_checkpoint(tmp_path / "qwen", "qwen2")
    two_digits.save_pretrained(folder)
    assert load_tokenizer(folder).encode("1212") == [2, 2]


def test_folder_without_a_tokenizer(tmp_path):
    folder = families.write_checkpoint(tmp_path / "llama", "llama_2")
    with pytest.raises(ValueError, match=r"llama has no tokenizer; copy the tokenizer\.json of its model there"):
        load_tokenizer(folder)


def test_a_file_that_is_none(tmp_path):
    folder = families.write_checkpoint(tmp_path / "llama", "llama_2")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="llama has no tokenizer that transformers can load") as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
