"""The 13 RULER-style tasks: answers, lengths, seeds, and that nothing but the answer looks like the answer."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.tasks import biographies, frequent_words, niah, variable_tracking, word_lists
from eval.tasks.filling import fit
from eval.tasks.niah import Niah
from eval.tasks.ruler_style import RULER_STYLE, SMALL
from eval.tasks.task import Haystack
from recycled_jax.commands.loading import Checkpoint
from recycled_jax.tasks import words as prose_words

NAMES = list(RULER_STYLE)
TOKENIZERS = {"embedded": Checkpoint.find(None).text.encode, "characters": list, "words": str.split}
# A number of characters holds fewer words than that of tokens: what fits then.
FOR_CHARACTERS = {
    "rs_vt": {"example_tokens": 0},
    "rs_cwe": {"num_cw": 3, "freq_cw": 6, "freq_ucw": 1, "solved": False, "gen_tokens": 40},
    "rs_qa_2": {"near": 1},
}


def example(name, length=2048, seed=42, index=0, encode=str.split, **params):
    return RULER_STYLE[name](**params).example(length=length, seed=seed, index=index, encode=encode)


def score(name, made, answer):
    """The metrics of RULER, from their formulas."""
    hits = [output.lower() in answer.lower() for output in made.outputs]
    assert RULER_STYLE[name]().metric == ("part" if "_qa_" in name else "all")
    return 100 * (float(any(hits)) if "_qa_" in name else sum(hits) / len(hits))


def others(made):
    """The prompt without its answers, in lower case."""
    text = made.prompt.lower()
    for output in made.outputs:
        text = text.replace(output.lower(), "|")
    return text


def shifted(text):
    """Another value of the same form: each letter and digit is replaced by its successor."""
    following = {
        a: b
        for group in ("0123456789", "abcdefghijklmnopqrstuvwxyz")
        for a, b in zip(group, group[1:] + group[0], strict=True)
    }
    return "".join(following.get(character, character) for character in text.lower())


def test_the_13_tasks_and_their_small_versions():
    assert len(NAMES) == 13 and all(name.startswith("rs_") for name in NAMES)
    assert list(SMALL) == NAMES
    defaults = {name: make() for name, make in RULER_STYLE.items()}
    gen_tokens = {name: example(name, length=4096).gen_tokens for name in NAMES}
    assert gen_tokens == {n: 128 for n in NAMES if "niah" in n} | {
        "rs_vt": 30,
        "rs_cwe": 120,
        "rs_fwe": 50,
        "rs_qa_1": 32,
        "rs_qa_2": 32,
    }
    for name, task in defaults.items():
        assert SMALL[name].keys() <= task.params.keys()
        assert RULER_STYLE[name](**SMALL[name]) != task
    assert len({(type(task), str(task.params)) for task in defaults.values()}) == 13


@pytest.mark.parametrize("name", NAMES)
def test_gold_scores_100_nothing_0_and_other_values_0(name):
    for index in range(3):
        made = example(name, index=index)
        assert score(name, made, made.gold) == 100
        assert score(name, made, "") == 0
        assert score(name, made, shifted(made.gold)) == 0
        assert score(name, made, example(name, index=index + 100).gold) <= 100 / 5  # a word or two of cwe may recur
        assert score(name, made, made.question + made.answer_prefix) == 0
        assert len(set(made.outputs)) == len(made.outputs)
        for output in made.outputs:
            assert output in made.context
        assert made.question[0] == "\n" and made.answer_prefix[0] == made.gold[0] == " "
        assert not re.search(r"[{}]", made.prompt)
    if len(made.outputs) > 1:
        assert score(name, made, made.outputs[0]) == pytest.approx(100 / len(made.outputs))


@pytest.mark.parametrize("name", NAMES)
def test_gold_fits_into_its_tokens(name):
    for params in ({}, SMALL[name]):
        for index in range(8):
            made = example(name, index=index, **params)
            assert len(TOKENIZERS["embedded"](made.gold)) <= made.gen_tokens  # one for <s>, which is as much as the end


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_a_length_is_filled_to_99_percent(name, length, tokenizer):
    encode, params = TOKENIZERS[tokenizer], FOR_CHARACTERS.get(name, {}) if tokenizer == "characters" else {}
    for index in range(3):
        made = example(name, length, index=index, encode=encode, **params)
        assert 0.99 * length <= len(encode(made.prompt)) + made.gen_tokens <= length


@pytest.mark.parametrize("length", [512, 1024, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_a_small_one_is_filled_too(name, length):
    encode = TOKENIZERS["embedded"]
    made = example(name, length, encode=encode, **SMALL[name])
    assert 0.985 * length <= len(encode(made.prompt)) + made.gen_tokens <= length
    assert score(name, made, made.gold) == 100


@pytest.mark.parametrize("name", NAMES)
def test_examples_depend_on_length_seed_and_index_alone(name):
    made = [example(name, index=i) for i in range(3)]
    assert example(name, index=2) == made[2]
    assert len({one.prompt for one in made}) == 3
    assert len({one.outputs for one in made}) == 3
    assert example(name, seed=43).prompt != made[0].prompt
    assert example(name, length=2049).outputs != made[0].outputs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [-5, 60])
def test_too_short_a_length_names_one_that_works(name, length):
    with pytest.raises(
        ValueError, match=rf"^length={length} is too short for .*, the smallest that works here is \d+"
    ) as e:
        example(name, length)
    least = int(re.findall(r"(\d+) tokens", str(e.value))[-1])
    made = example(name, least)
    assert len(made.prompt.split()) + made.gen_tokens <= least
    if least - 1 > length:
        with pytest.raises(ValueError, match="is too short"):
            example(name, least - 1)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    small=st.booleans(),
    length=st.integers(700, 3000),
    seed=st.integers(0, 2**32),
    index=st.integers(0, 10**6),
)
def test_no_answer_is_inside_anything_else(name, small, length, seed, index):
    made = example(name, length, seed, index, **(SMALL[name] if small else {}))
    for one, other in itertools.permutations(made.outputs, 2):
        assert one.lower() not in other.lower()
    words = Counter(re.findall(r"[\w-]+", made.prompt.lower()))
    for output in made.outputs:  # it only occurs as a word of its own
        assert made.prompt.lower().count(output.lower()) == words[output.lower()] > 0
    assert len(made.prompt.split()) + made.gen_tokens <= length


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(niah.KINDS),
    kinds=st.sampled_from(
        [("words", "numbers"), ("nouns", "numbers"), ("numbers", "numbers"), ("numbers", "uuids"), ("uuids", "uuids")]
    ),
    keys=st.integers(1, 6),
    values=st.integers(1, 4),
    queries=st.integers(1, 6),
    digits=st.integers(4, 9),
    seed=st.integers(0, 2**32),
)
def test_keys_and_values_of_needles_are_distinct(kind, kinds, keys, values, queries, digits, seed):
    task = Niah(kind, keys, values, queries, *kinds, digits)
    made = task.example(length=1500, seed=seed, index=0, encode=str.split)
    facts = re.findall(r"(?:The|One) magic (?:number|code) for (\S+) is ([\w-]+)\.", made.context)
    stated = [value for _, value in facts]
    per_key = Counter(key for key, _ in facts)
    assert len(set(stated)) == len(stated)
    assert not set(stated) & per_key.keys()
    hidden = [key for key in per_key if values == 1 or per_key[key] == values]
    assert len(hidden) >= max(keys, queries) and (values > 1 or len(per_key) == len(facts))
    asked = [key for key in per_key if re.search(rf"(?:for|,|and) {key}\b", made.question)]
    assert len(asked) == queries
    assert (
        set(made.outputs) == {value for key, value in facts if key in asked} and len(made.outputs) == queries * values
    )
    assert len(facts) == max(keys, queries) * values or kind == "needle"
    for value in stated:
        assert made.context.count(value) == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kind": "hay"}, "kind='hay' is not one of noise, essay, needle"),
        ({"key_kind": "colours"}, "key_kind='colours' is not one of"),
        ({"value_kind": "words"}, "value_kind='words' is not one of"),
        ({"key_kind": "uuids"}, "a number may occur inside a uuid"),
        ({"keys": 0}, "keys=0 must be at least 1"),
        ({"digits": 19}, "digits=19 must be between 1 and 18"),
        ({"keys": 41}, r"keys=41, values=1 and queries=1 hide 41 needles, .* has room for 40"),
        ({"kind": "noise", "digits": 1, "keys": 4}, "keys=4, .* has room for 3"),
        ({"kind": "noise", "haystack": Haystack("", ("A text.",))}, "kind='noise' reads no haystack"),
    ],
)
def test_parameters_that_no_text_could_be_made_of(params, message):
    with pytest.raises(ValueError, match=message):
        Niah(**params)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("rs_vt", {"hops": 0}, "hops=0 must be at least 1"),
        ("rs_vt", {"example_tokens": -1}, "example_tokens=-1 must not be negative"),
        ("rs_vt", {"digits": 1, "chains": 3}, "digits=1 has too few numbers for chains=3"),
        ("rs_cwe", {"num_cw": 21}, "num_cw=21 must be between 1 and 20"),
        ("rs_cwe", {"freq_cw": 2}, "freq_ucw=3 must be at least 1 and below freq_cw=2"),
        ("rs_fwe", {"alpha": 1.0}, "alpha=1.0 must be above 1"),
        ("rs_fwe", {"letters": 3}, "letters=3 must be between 4 and 32"),
        ("rs_fwe", {"vocabulary": 3}, "vocabulary=3 must be between 4 and"),
        ("rs_qa_1", {"hops": 3}, "hops=3 must be 1 or 2"),
        ("rs_qa_2", {"near": 26}, "near=26 must be between 0 and 25"),
    ],
)
def test_parameters_of_the_other_tasks(name, params, message):
    with pytest.raises(ValueError, match=message):
        RULER_STYLE[name](**params)


def test_needles_stand_in_a_text_of_the_users_and_no_value_occurs_in_it():
    # all but two numbers of one digit are taken, and three is what the task may draw from
    sentences = ("In 1345 and 6789 it rained.", "Nobody came and nothing was said.")
    task = Niah(digits=1, haystack=Haystack("0" * 64, sentences))
    for index in range(20):
        made = task.example(length=600, seed=1, index=index, encode=str.split)
        assert made.outputs == ("2",)
        assert set(re.split(r"(?<=\.) ", made.context.split("\n")[1])) > set(sentences)
    assert task.params["haystack"] == "0" * 64
    with pytest.raises(ValueError, match=r"no word or number like '.' is left"):
        Niah(digits=1, haystack=Haystack("", ("It is 123456789.",))).example(
            length=600, seed=1, index=0, encode=str.split
        )


def test_chains_keep_their_order_and_only_the_first_is_asked():
    made = example("rs_vt", chains=3, hops=4, example_tokens=200)
    solved, text = made.context.split("Now the same for another text.\n")
    lets = re.findall(r"Let (\w+) be (?:(\d+)|what (\w+) is)\.", text)
    stands_for = {}
    for name, number, before in lets:
        stands_for[name] = number or stands_for[before]  # a name is explained before it is used
    assert Counter(stands_for.values()) == dict.fromkeys(stands_for.values(), 5) and len(stands_for) == 15
    assert tuple(name for name in stands_for if stands_for[name] == made.meta["value"]) == made.outputs
    assert not stands_for.keys() & set(re.findall(r"\b[A-Z]{5}\b", solved))
    assert made.meta["value"] in made.question and len(solved.split()) <= 200
    [answer] = re.findall(r"names that stand for \d+ are ([A-Z ]+)$", solved, re.MULTILINE)
    assert len(answer.split()) == 5


@pytest.mark.parametrize(("length", "common", "other"), [(3000, 6, 1), (4096, 30, 3), (9000, 30, 3)])
def test_common_words_stand_there_as_often_as_ruler_says(length, common, other):
    made = example("rs_cwe", length)
    solved, text = made.context.split("Now the same for another list.\n")
    numbers, listed = zip(*re.findall(r"(\d+)\. (\S+)", text), strict=True)
    counts = Counter(listed)
    assert [int(number) for number in numbers] == list(range(1, len(listed) + 1))
    assert {word for word, count in counts.items() if count == common} == set(made.outputs)
    assert set(counts.values()) == {common, other}
    shown = Counter(re.findall(r"\d+\. (\S+)", solved))
    most = [word for word, _ in shown.most_common(10)]
    assert not shown.keys() & counts.keys() and len(shown) == (40 if length >= 4096 else 20)
    assert set(re.findall(r"most often are?: (.*)$", solved, re.MULTILINE)[0].split(", ")) == set(most)


@pytest.mark.parametrize("length", [600, 2048, 9000])
def test_coded_words_follow_zipf(length):
    made = example("rs_fwe", length)
    counts = Counter(made.context.split("\n", 1)[1].split()).most_common()
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:4]) == made.outputs
    assert counts[3][1] > counts[4][1] and len(counts) <= (length - 50) // 50
    total = counts[1][1] / (0.25 / (np.pi**2 / 6))  # int(N·2^−2 / ζ(2)) is the count of rank 2
    assert counts[2][1] == pytest.approx(total / 9 / (np.pi**2 / 6), abs=1.5)
    assert all(len(word) == 6 for word, _ in counts[1:])


def test_zeta():
    assert frequent_words._zeta(2.0) == pytest.approx(np.pi**2 / 6, abs=1e-9)
    assert frequent_words._zeta(4.0) == pytest.approx(np.pi**4 / 90, abs=1e-9)


@pytest.mark.parametrize(("name", "hops"), [("rs_qa_1", 1), ("rs_qa_2", 2)])
def test_biographies_answer_their_question(name, hops):
    depths = []
    for index in range(12):
        made = example(name, index=index)
        lives = re.split(r"\nDocument \d+\n", made.context)[1:]
        assert len(lives) == made.meta["documents"]
        born = dict(re.findall(r"(\w+ \w+) was born in (\w+) in", made.context))
        moved = dict(m.groups() for life in lives if (m := re.search(r"^(\w+ \w+) .* moved to (\w+) and", life)))
        teacher = dict(re.findall(r"(\w+ \w+) learned to be an? \w+ from (\w+ \w+)\.", made.context))
        assert len(born) == len(lives) and len({*born.values(), *moved.values()}) == len(born) + len(moved)
        [person] = re.findall(r"(?:was|did|of) ([A-Z]\w+ [A-Z]\w+) (?:born|move)", made.question)
        about = person if hops == 1 else teacher[person]
        assert made.outputs == ((born if made.question.endswith(" born?") else moved)[about],)
        depths.append(list(born).index(about) / len(born))
        if hops == 2:
            near = [name for name in born if name.split()[1] in (person.split()[1], about.split()[1])]
            assert len(near) == 10
    assert min(depths) < 0.3 and max(depths) > 0.7


def test_no_word_list_repeats_and_none_speaks_as_the_templates_do():
    lists = (word_lists.NOUNS, word_lists.ADJECTIVES, word_lists.FIRST_NAMES)
    prose = {*prose_words.ROLES, *prose_words.PLACES, *prose_words.THINGS, *prose_words.VERBS, *prose_words.TIMES}
    words = [word for each in lists for word in each]
    assert len(set(words)) == len(words) and not prose & {*words}
    templates = " ".join(
        text
        for module in (niah, variable_tracking, frequent_words)
        for name, text in vars(module).items()
        if name.isupper() and isinstance(text, str)
    )
    plain = f"{templates} {word_lists.NOISE}".lower()
    assert not [word for word in word_lists.NOUNS if len(word) > 3 and word in plain]
    for parts in ("_SURNAME_STARTS", "_SURNAME_ENDS", "_TOWN_STARTS", "_TOWN_MIDDLES", "_TOWN_ENDS"):
        part = getattr(word_lists, parts)
        assert len({len(one) for one in part}) == 1 and len(set(part)) == len(part)
    longest = max(len(word) for word in re.findall(r"\w+", " ".join(biographies.LIFE) + biographies.HEADER))
    assert longest < len(word_lists.town(np.random.default_rng(0)))


@given(steps=st.lists(st.integers(0, 30), min_size=1, max_size=80), limit=st.integers(0, 900))
def test_fit_finds_a_number_within_the_limit_that_one_more_or_half_a_percent_would_pass(steps, limit):
    sums = [5, *(5 + np.cumsum(steps)).tolist()]
    units, count = fit(lambda n: sums[n], limit, most=len(steps))
    assert count == sums[units] and (count <= limit or units == 0)
    assert units == len(steps) or sums[units + 1] > limit or count >= 0.995 * limit


def test_fit_counts_few_times():
    counted = []
    units, _ = fit(lambda n: counted.append(n) or 40 + 13 * n + n % 7, 32768, most=32768)
    assert 32600 < 40 + 13 * units <= 32768 and len(counted) <= 4 and max(counted) < 2600
