"""The generated tasks: facts hidden in filler, a question, and what counts as an answer."""

import hashlib
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax.tasks import words
from recycled_jax.tasks.example import Example
from recycled_jax.tasks.prose import generated_sentences, read_haystack, split_sentences
from recycled_jax.tasks.retrieval import TASKS, RetrievalTask, hide, make_example, score

NOVEL = [f"Sentence {i} of the novel tells of {'many ' * (i % 7)}things." for i in range(300)]
NUMBER = re.compile(r"The magic number for (\w+) is (\d+)\.")
HOP = re.compile(r"From (\w+) go to (\w+)\.")


def encode(text: str) -> list[int]:
    """Words and single characters, one token each, after one for the beginning."""
    return [0, *(len(token) for token in re.findall(r" ?[A-Za-z]+|.", text, re.DOTALL))]


def example(task: str = "multikey", *, length: int = 600, seed: int = 0, index: int = 0, **rest) -> Example:
    return make_example(TASKS[task], length=length, seed=seed, index=index, **{"encode": encode, **rest})


@pytest.mark.parametrize("haystack", [None, NOVEL], ids=["generated", "novel"])
@pytest.mark.parametrize("task", TASKS)
def test_an_example_depends_on_its_index_and_not_on_how_many_are_made(task, haystack):
    several = [example(task, index=index, haystack=haystack) for index in range(4)]
    assert several[3] == example(task, index=3, haystack=haystack)
    assert len({one.context for one in several}) == 4


def test_seed_and_length_and_task_change_the_example():
    variants = [example(), example(seed=1), example(length=601), example("single"), example("chain")]
    assert len({one.context for one in variants}) == len(variants)


def test_wording_is_that_of_its_template_version():
    texts = [example(task, haystack=haystack).prompt for task in TASKS for haystack in (None, NOVEL)]
    # recorded scores belong to this text: whoever changes it raises TEMPLATE_VERSION, and this digest with it
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] == "ca2370d6c43ba7cd"


@settings(max_examples=40)
@given(task=st.sampled_from(sorted(TASKS)), length=st.integers(400, 3000), seed=st.integers(0, 2**32))
def test_length_is_kept_and_used(task, length, seed):
    for haystack in (None, NOVEL):
        one = example(task, length=length, seed=seed, haystack=haystack)
        used = len(encode(one.prompt)) + one.gen_tokens
        assert 0.9 * length <= used <= length
        assert one.gen_tokens >= len(encode(one.gold))


@settings(max_examples=30)
@given(task=st.sampled_from(["single", "multikey"]), seed=st.integers(0, 2**32), index=st.integers(0, 999))
def test_numbers_are_distinct_and_the_asked_one_is_the_answer(task, seed, index):
    one = example(task, seed=seed, index=index)
    facts = NUMBER.findall(one.context)
    keys, values = zip(*facts, strict=True)
    assert len(set(keys)) == len(set(values)) == len(facts) == TASKS[task].keys
    asked = re.fullmatch(r"\nWhat is the magic number for (\w+)\? ", one.question)
    assert asked is not None
    assert one.outputs == (dict(facts)[asked[1]],)
    assert one.answer_prefix + one.gold == f"The magic number for {asked[1]} is {one.outputs[0]}."


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), index=st.integers(0, 999))
def test_a_chain_leads_from_the_asked_start_through_the_outputs(seed, index):
    one = example("chain", seed=seed, index=index)
    hops = HOP.findall(one.context)
    following = dict(hops)
    assert len(following) == len(hops) == TASKS["chain"].keys
    asked = re.fullmatch(r"\nWhich way leads from (\w+)\? ", one.question)
    assert asked is not None
    at, path = asked[1], []
    while at in following:
        at = following[at]
        path.append(at)
    assert tuple(path) == one.outputs
    assert HOP.findall(one.answer_prefix + one.gold) == list(itertools.pairwise([asked[1], *path]))


@pytest.mark.parametrize("task", TASKS)
def test_facts_stand_between_whole_sentences_of_the_haystack(task):
    one = example(task, length=1500, haystack=NOVEL)
    sentences = split_sentences(one.context)
    filler = [sentence for sentence in sentences if not (NUMBER.fullmatch(sentence) or HOP.fullmatch(sentence))]
    assert len(sentences) - len(filler) == TASKS[task].keys
    start = NOVEL.index(filler[0])
    assert filler == [NOVEL[i % len(NOVEL)] for i in range(start, start + len(filler))]


def test_facts_stand_at_all_depths():
    depths = [
        NUMBER.search(one.context).start() / len(one.context) for one in (example("single", index=i) for i in range(60))
    ]
    assert np.histogram(depths, bins=4, range=(0, 1))[0].min() >= 5


def test_a_short_haystack_is_repeated():
    assert example("single", haystack=["It rains."]).context.count("It rains.") > 50


@pytest.mark.parametrize("text", ["word " * 20_000, "字" * 60_000], ids=["no full stop", "no space"])
def test_a_haystack_that_is_one_long_sentence_still_fills_the_length(text):
    one = example("single", length=4096, haystack=[text.strip()])
    assert len(encode(one.prompt)) >= 0.85 * 4096
    assert NUMBER.search(one.context)


@pytest.mark.parametrize("task", TASKS)
def test_oracle_scores_one_and_silence_zero(task):
    one = example(task)
    assert score(one, one.gold) == score(one, f"I think it is {one.gold.upper()}") == 1
    assert score(one, "") == 0


def test_part_of_a_path_scores_its_share():
    one = example("chain")
    assert score(one, " ".join(one.outputs[:3])) == 3 / 4


@pytest.mark.parametrize("task", TASKS)
def test_length_too_short_names_the_smallest_that_works(task):
    def characters(text: str) -> list[int]:
        return list(text.encode())  # keys differ in length, so the examples of different lengths do too

    with pytest.raises(ValueError, match=r"length=30 is too short for RetrievalTask") as raised:
        example(task, length=30, encode=characters)
    least = int(re.search(r"smallest that works here is (\d+) tokens", str(raised.value))[1])
    assert example(task, length=least, encode=characters).gen_tokens > 1
    with pytest.raises(ValueError, match=f"length={least - 1} is too short"):
        example(task, length=least - 1, encode=characters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keys": 0}, "keys=0 must be between 1 and"),
        ({"keys": 10_000}, "keys=10000 must be between 1 and"),
        ({"keys": 4, "hops": 5}, "hops=5 must be between 0 and keys=4"),
    ],
)
def test_impossible_task(settings, message):
    with pytest.raises(ValueError, match=message):
        RetrievalTask(**settings)


def test_hide_keeps_the_order_of_filler_and_works_on_anything():
    assert hide(["a", "b"], [1.0, 0.0], ["x", "y"]) == ["b", "x", "y", "a"]
    assert hide(["a"], [0.5], ["x", "y"]) == ["x", "a", "y"]
    assert hide([[1], [2]], [0.3, 0.3], []) == [[1], [2]]


def test_no_word_is_in_two_lists_and_no_key_in_the_prose():
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
    everything = list(itertools.chain(*lists))
    assert len(set(everything)) == len(everything)
    prose = " ".join(generated_sentences(np.random.default_rng(0), 2000))
    assert not set(re.findall(r"\w+", prose.lower())) & set(words.KEYS)
    assert not re.search(r"\d", prose)


def test_haystack_is_read_by_sentences(tmp_path):
    (tmp_path / "novel.txt").write_text("It was\nlate.  Who came?\n\n“Me!” said he", encoding="utf-8")
    assert read_haystack(tmp_path / "novel.txt") == ["It was late.", "Who came?", "“Me!” said he"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9.", "haystack=.*novel.txt' is not UTF-8 text: byte 3"), (b" \n ", "haystack=.*novel.txt' is empty")],
)
def test_bad_haystack(tmp_path, content, message):
    (tmp_path / "novel.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_haystack(tmp_path / "novel.txt")


def test_missing_haystack(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"novel\.txt"):
        read_haystack(tmp_path / "novel.txt")
