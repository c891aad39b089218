import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recycled_jax.tasks import words
from recycled_jax.tasks.retrieval import TASKS, make_example
from train.tokenizer import BOS, EOS, PAD

DIGITS = st.text(st.sampled_from("0123456789"), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def ids(tokenizer):
    """Token ids of a text, without the special ones."""
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@given(number=DIGITS)
def test_numbers_are_pairs_of_digits(tokenizer, ids, number):
    pairs = [number[i : i + 2] for i in range(0, len(number), 2)]
    assert tokenizer.convert_ids_to_tokens(ids(number)) == pairs


@given(text=st.text(st.sampled_from("0123456789 .,-aB\n٣½"), max_size=40))
def test_no_token_has_more_than_two_digits(tokenizer, ids, text):
    for token in tokenizer.convert_ids_to_tokens(ids(text)):
        assert len(re.findall(r"[0-9]", token)) <= 2
        assert not re.search(r"[0-9][^0-9]|[^0-9][0-9]", token)


def test_task_words_are_single_tokens(ids):
    lists = (
        words.KEYS,
        words.PEOPLE,
        words.ROLES,
        words.PLACES,
        words.THINGS,
        words.ADJECTIVES,
        words.VERBS,
        words.TIMES,
    )
    assert [word for some in lists for word in some if len(ids(f" {word}")) != 1] == []


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_meet_at_a_token_boundary(tokenizer, ids, task):
    for index in range(10):
        example = make_example(
            TASKS[task], length=400, seed=0, index=index, encode=lambda text: tokenizer(text)["input_ids"]
        )
        assert ids(example.prompt) + ids(example.gold) == ids(example.prompt + example.gold)


@given(text=st.text(max_size=60))
def test_round_trip(tokenizer, ids, text):
    assume(not any(special in text for special in (BOS, EOS, PAD)))
    assert tokenizer.decode(ids(text)) == text


@pytest.mark.parametrize(
    "text", ["Yes , he 's . Isn 't it ?", "  two  spaces \n\n", "crlf\r\n\ttab", "naïve café 字 🙂"]
)
def test_round_trip_keeps_spaces(tokenizer, ids, text):
    assert tokenizer.decode(ids(text)) == text


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_loads_from_its_folder(tokenizer, tmp_path, loader):
    tokenizer.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    text = "The magic number for apple is 1234567."
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (BOS, EOS, PAD)
    assert len(loaded) == len(tokenizer) == len(set(loaded.get_vocab().values()))


def test_a_text_begins_with_bos(tokenizer):
    assert tokenizer("apple")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("apple")["input_ids"][1:] == tokenizer("apple", add_special_tokens=False)["input_ids"]
