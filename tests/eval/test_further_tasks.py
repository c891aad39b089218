"""The tasks beyond RULER's: passkey, needle, chain of keys, table of a page, several turns."""

import hashlib
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import METRICS
from eval.tasks.chain_of_key import WORDS, ChainOfKey, distinct_words, longest_chain
from eval.tasks.filling import prompt_and_answer
from eval.tasks.further import FURTHER, SMALL
from eval.tasks.html_tsv import HtmlTsv
from eval.tasks.multiturn import MultiTurn, all_turns
from eval.tasks.needle import Needle
from eval.tasks.passkey import Passkey
from eval.tasks.sentences import Filler, insert_at, token_sizes
from eval.tasks.task import Haystack, Task
from eval.tasks.word_lists import distinct_numbers
from recycled_jax.commands.loading import Checkpoint
from recycled_jax.tasks.example import Encode, Example
from recycled_jax.tasks.prose import generated_sentences

NOVEL = Haystack("0" * 64, tuple(f"Sentence {i} of the novel tells of {'many ' * (i % 7)}things." for i in range(300)))
FACT = re.compile(r"The magic number for ([a-z-]+) is (\d+)\.")

TASKS: dict[str, Task] = {
    "passkey": Passkey(),
    "passkey at a depth": Passkey(digits=9, depth=25),
    "needle": Needle(),
    "needle with distractors": Needle(depths=(50,), distractors=8, digits=5),
    "needle in a novel": Needle(haystack=NOVEL),
    "chain": ChainOfKey(),
    "chain with a start": ChainOfKey(chain=4, start="given"),
    "table": HtmlTsv(columns=2, out_level=64, tables=2),
    "table with a filter": HtmlTsv(columns=4, out_level=160, tables=1, filter="one"),
    "table in a novel": HtmlTsv(out_level=100, tables=2, haystack=NOVEL),
    "turns": MultiTurn(),
    "five turns": MultiTurn(turns=5, control=False, digits=5, key_words=1),
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def words(text: str) -> list[int]:
    """Words and single characters, one token each, after one for the beginning."""
    return [0, *(len(token) for token in re.findall(r" ?[A-Za-z]+|.", text, re.DOTALL))]


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def white_space(text: str) -> list[int]:
    return [len(word) for word in text.split()]


@pytest.fixture(scope="module", params=["embedded", "characters", "white space"])
def encode(request) -> Encode:
    tokenizers: dict[str, Callable[[], Encode]] = {
        "embedded": lambda: Checkpoint.find(None).text.encode,
        "characters": lambda: characters,
        "white space": lambda: white_space,
    }
    return tokenizers[request.param]()


def make(task: Task, *, length: int = 3000, seed: int = 0, index: int = 0, encode: Encode = words) -> Example:
    return task.example(length=length, seed=seed, index=index, encode=encode)


def used(task: Task, example: Example, encode: Encode) -> int:
    return (all_turns if isinstance(task, MultiTurn) else prompt_and_answer)(example, encode)


def score(task: Task, example: Example, answer: str) -> float:
    return METRICS[task.metric](answer, example.outputs, example.meta)["score"]


@pytest.mark.parametrize("length", [2048, 4096])
@each_task
def test_length_is_kept_and_filled(task, length, encode):
    for index in range(2):
        one = make(task, length=length, index=index, encode=encode)
        assert prompt_and_answer(one, encode) <= length
        assert 0.99 * length <= used(task, one, encode) <= length
        assert len(encode(one.gold)) <= one.gen_tokens


@settings(max_examples=25)
@given(name=st.sampled_from(sorted(TASKS)), length=st.integers(1600, 5000), seed=st.integers(0, 2**32))
def test_any_length_is_kept_and_filled(name, length, seed):
    one = make(TASKS[name], length=length, seed=seed)
    assert 0.98 * length <= used(TASKS[name], one, words) <= length


@each_task
def test_the_gold_answer_scores_100_and_others_nothing(task):
    examples = [make(task, index=i) for i in range(12)]
    for one, other in zip(examples, [*examples[1:], examples[0]], strict=True):
        assert score(task, one, one.gold) == 100
        assert score(task, one, "") == 0
        assert score(task, one, other.gold) < 100
    assert all(one.question[0].isspace() and one.prompt.endswith(one.answer_prefix) for one in examples)


@each_task
def test_an_example_depends_on_its_arguments_alone(task):
    several = [make(task, index=i) for i in range(4)]
    assert several[3] == make(task, index=3)
    variants = [*several, make(task, seed=1), make(task, length=3001), make(MultiTurn(turns=3), index=0)]
    assert len({one.context for one in variants}) == len(variants)


@each_task
def test_a_length_too_short_names_one_that_works(task, encode):
    with pytest.raises(ValueError, match=r"length=30 is too short for .*, the smallest that works here is") as raised:
        make(task, length=30, encode=encode)
    named = re.search(r"works here is (\d+) tokens", str(raised.value))
    assert named is not None
    least = int(named[1])
    assert used(task, make(task, length=least, encode=encode), encode) <= least
    assert least < 2048


def test_wording_is_that_of_the_version():
    texts = [make(task).prompt for task in TASKS.values()]
    # recorded scores belong to this text: whoever changes a task's raises its `version`, and this digest with it
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] == "e36cd4c522545644"


@pytest.mark.parametrize("name", FURTHER)
def test_small_tasks_suit_the_embedded_model(name):
    text = Checkpoint.find(None).text.encode
    one = make(FURTHER[name](**SMALL[name]), length=1024, encode=text)
    assert len(text(one.gold)) <= one.gen_tokens
    assert SMALL.keys() == FURTHER.keys()


@pytest.mark.parametrize(
    ("make_task", "message"),
    [
        (lambda: Passkey(digits=0), "digits=0 must be between 1 and 18"),
        (lambda: Passkey(depth=101), "depth=101 must be between 0 and 100"),
        (lambda: Needle(depths=()), r"depths=\(\) must be one percentage or more"),
        (lambda: Needle(depths=(0, -1)), r"depths=\(0, -1\) must be"),
        (lambda: Needle(distractors=275), "distractors=275 must be between 0 and 274"),
        (lambda: Needle(distractors=9, digits=1), "digits=1 must be between 1 and 18 and allow for 10 different"),
        (lambda: ChainOfKey(chain=0), "chain=0 must be at least 1"),
        (lambda: ChainOfKey(start="any"), "start='any' must be 'free' or 'given'"),  # pyright: ignore[reportArgumentType]
        (lambda: HtmlTsv(columns=6), "columns=6 must be between 2 and 5"),
        (lambda: HtmlTsv(tables=0), "tables=0 must be between 1 and 10"),
        (lambda: HtmlTsv(filter="two"), "filter='two' must be 'none' or 'one'"),  # pyright: ignore[reportArgumentType]
        (lambda: make(HtmlTsv(out_level=5)), r"out_level=5 is too small for a header and a row, which need \d+ tokens"),
        (lambda: MultiTurn(turns=6), "turns=6 must be between 2 and 5"),
        (lambda: MultiTurn(key_words=3), "key_words=3 must be 1 or 2"),
    ],
)
def test_bad_parameters_are_refused(make_task, message):
    with pytest.raises(ValueError, match=message):
        make_task()


def test_the_pass_key_is_said_twice_in_one_place():
    for index in range(20):
        one = make(Passkey(digits=6), index=index)
        (key,) = one.outputs
        assert [match[0] for match in re.finditer(r"\d+", one.prompt)] == [key, key]
        assert one.context.index(key) / len(one.context) == pytest.approx(one.meta["depth"] / 100, abs=0.03)
    places = [make(Passkey(), index=i).meta["depth"] for i in range(40)]
    assert min(places) < 20 < 80 < max(places)
    assert {make(Passkey(depth=70), index=i).meta["depth"] for i in range(3)} == {70}


@pytest.mark.parametrize("distractors", [0, 20])
def test_a_needle_stands_at_its_depth_in_tokens(distractors, encode):
    # half of it has more tokens than characters would tell: a depth in characters would be another one
    uneven = Haystack("1" * 64, (*["It rains and it rains again."] * 60, *["0 1 2 3 4 5 6 7 8 9 + - * / ( )."] * 60))
    for haystack in (None, uneven):
        task = Needle(distractors=distractors, digits=7, haystack=haystack)
        for index in (0, 3, 5, 9, 10, 12):
            one = make(task, length=2048, index=index, encode=encode)
            fact = next(match for match in FACT.finditer(one.context) if match[2] in one.outputs)
            start, end, bos = fact.start(), fact.end(), len(encode(""))
            before, after = (len(encode(part)) - bos for part in (one.context[:start], one.context[end:]))
            assert one.meta["depth"] == task.depths[index % len(task.depths)]
            assert 100 * before / (before + after) == pytest.approx(one.meta["depth"], abs=2)
            assert (start == 0, end == len(one.context)) == (one.meta["depth"] == 0, one.meta["depth"] == 100)


@pytest.mark.parametrize("haystack", [None, NOVEL], ids=["grammar", "novel"])
def test_distractors_have_other_keys_and_numbers(haystack):
    one = make(Needle(distractors=12, haystack=haystack))
    facts = dict(FACT.findall(one.context))
    assert len(facts) == len(set(facts.values())) == 13
    asked = FACT.fullmatch(one.answer_prefix + one.gold)
    assert asked is not None and facts[asked[1]] == asked[2] == one.outputs[0]
    assert asked[1] in one.question
    assert all(one.context.count(number) == 1 for number in facts.values())


def test_the_first_words_of_a_filler():
    filler = Filler(["One two, three four.", "Five six."])
    texts = ["", "One.", "One two.", "One two, three.", "One two, three four.", "One two, three four. Five."]
    assert [" ".join(filler.first(n)) for n in range(6)] == texts
    assert filler.first(filler.words) == ["One two, three four.", "Five six."]


def test_a_fact_goes_to_the_nearest_boundary():
    around = [("a", 10.0), ("b", 30.0), ("c", 60.0)]  # boundaries at 0, 10, 40 and 100 percent
    places = {depth: insert_at("X", depth, around).index("X") for depth in (0, 4, 6, 24, 26, 69, 71, 100)}
    assert places == {0: 0, 4: 0, 6: 1, 24: 1, 26: 2, 69: 2, 71: 3, 100: 3}


def test_numbers_do_not_occur_in_the_text_around_them():
    taken = " ".join(str(n) for n in range(100, 900))
    numbers = distinct_numbers(np.random.default_rng(0), 100, 3, avoid=taken)
    assert sorted(numbers) == [str(n) for n in range(900, 1000)]


def test_token_sizes_add_up(encode):
    sentences = generated_sentences(np.random.default_rng(0), 200)
    sizes = token_sizes(sentences, encode, enough=500)
    whole = len(encode(" ".join(sentences[: len(sizes)]))) - len(encode(""))
    assert len(sizes) < len(sentences) and sum(sizes) > 500
    assert sum(sizes) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("task", [ChainOfKey(), ChainOfKey(chain=4, start="given")], ids=["free", "given"])
@pytest.mark.parametrize("length", [1024, 8192])
def test_every_key_has_one_successor_in_one_cycle(task, length):
    one = make(task, length=length)
    keys = one.context.split("\n\n")[1].split("\n")
    assert keys == one.meta["keys"] and one.meta["chain"] == task.chain
    following = dict(key.split("-") for key in keys)
    assert len(following) == len(set(following.values())) == len(keys) > task.chain
    at, seen = next(iter(following)), set()
    while at not in seen:
        seen.add(at)
        at = following[at]
    assert len(seen) == len(keys)
    assert not {"salt", "wind", "cloud", "leaf"} & seen
    chain = one.gold.strip().split(", ")
    assert len(set(chain)) == task.chain and set(chain) <= set(keys)
    if task.start == "given":
        assert one.meta["start"] == chain[0].split("-")[0]
        assert f"begins with the word {one.meta['start']}." in one.question
    else:
        assert one.meta["start"] is None


def test_the_list_of_keys_does_not_give_the_chain_away():
    keys = make(ChainOfKey(), length=8192).meta["keys"]
    neighbours = sum(a.split("-")[1] == b.split("-")[0] for a, b in itertools.pairwise(keys))
    assert len(keys) > 500 and neighbours < 10


def test_an_answer_may_be_longer_than_the_longest_chain():
    keys = ["a-bb", "bb-ccc", "ccc-dddd", "dddd-a"]
    assert longest_chain(keys, 2, characters) == len(" bb-ccc, ccc-dddd")  # 17; the others have 13, 17 − 2 and 12
    one = make(ChainOfKey(chain=3), encode=characters)
    assert one.gen_tokens >= 1.3 * len(one.gold)


def test_there_are_words_for_long_lists():
    many = distinct_words(np.random.default_rng(0), 40_000)
    assert len(set(many)) == len(many) == 40_000
    assert set(many[: len(WORDS)]) == set(WORDS) and all(word.isalpha() and word.islower() for word in many)


class Tables(HTMLParser):
    """The tables of a page by the heading above them, as rows of the text of their cells; and its open tags."""

    def __init__(self, page: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.heading = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        if tag == "h2":
            self.heading = ""
        elif tag == "table":
            self.tables[self.heading] = []
        elif tag == "tr":
            self.tables[self.heading].append([])
        elif tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "h2" in self.open:
            self.heading += data
        elif "td" in self.open or "th" in self.open:
            self.tables[self.heading][-1][-1] += data


@settings(max_examples=15)
@given(
    columns=st.integers(2, 5),
    tables=st.integers(1, 5),
    filtered=st.booleans(),
    seed=st.integers(0, 2**32),
    long=st.booleans(),
)
def test_the_table_of_the_page_is_the_answer(columns, tables, filtered, seed, long):
    task = HtmlTsv(columns=columns, tables=tables, out_level=300, filter="one" if filtered else "none")
    one = make(task, length=8000 if long else 5000, seed=seed)
    page = Tables(one.context)
    topic = re.search(r'its table "(.+?)"', one.question)
    assert topic is not None and not page.open and len(page.tables) == tables
    table = page.tables[topic[1]]
    answer = [line.split("\t") for line in one.outputs[0].split("\n")]
    assert {tuple(rows[0]) for rows in page.tables.values()} == {tuple(answer[0])}
    assert ", ".join(answer[0]) in one.question
    assert all(len(rows) < len(table) for other, rows in page.tables.items() if other != topic[1])
    assert one.gold == f"```tsv\n{one.outputs[0]}\n```" and one.meta == {"rows": len(answer) - 1, "columns": columns}
    assert table[:1] + [row for row in table[1:] if _meets(row, table[0], one.question)] == answer
    assert len(table) - len(answer) == ((len(answer) - 1) // 2 if filtered else 0)


def _meets(row: list[str], headings: list[str], question: str) -> bool:
    """Whether a row meets the condition of a question, read by other code than made it."""
    asked = re.search(r"each row whose (\w+) (.+?), in the order", question)
    if asked is None:
        return True
    cell, wanted = row[headings.index(asked[1])], asked[2].split()[-1]
    return {
        "Date": lambda: int(cell.split("-")[0]) < int(wanted),
        "Price": lambda: float(cell.strip("$")) < float(wanted.strip("$")),
        "Place": lambda: cell.endswith(f" {wanted}"),
        "Code": lambda: cell.startswith(wanted),
    }[asked[1]]()


def test_answers_of_tables_use_their_level(encode):
    for level in (128, 512):
        one = make(HtmlTsv(out_level=level), length=9000, encode=encode)
        assert 0.75 * level <= len(encode(one.gold)) <= level + len(encode(""))
        assert one.gen_tokens == 1.25 * level


def test_a_page_has_what_makes_reading_it_hard():
    page = make(HtmlTsv(out_level=1024), length=12_000).context
    for mark in ("&amp;", "&#x27;", "<span>", "<em>", '<tr class="even">', "<nav", "<p>"):
        assert mark in page


@pytest.mark.parametrize("task", [MultiTurn(), MultiTurn(turns=5, key_words=1), MultiTurn(turns=3, control=False)])
def test_turns_ask_for_different_keys_and_the_control_for_the_first(task):
    one = make(task)
    facts = FACT.findall(one.context)
    turns = one.meta["turns"]
    assert len(dict(facts)) == len({value for _, value in facts}) == len(facts)
    asked = [FACT.fullmatch(turn["answer_prefix"] + turn["gold"]) for turn in turns]
    for match, turn in zip(asked, turns, strict=True):
        assert match is not None
        assert turn["outputs"] == [dict(facts)[match[1]]] == [match[2]]
        assert turn["question"] == f"\nWhat is the magic number for {match[1]}? "
    keys = [match[1] for match in asked if match is not None]
    assert len(set(keys)) == task.turns == len(keys) - task.control
    first = {"question": one.question, "answer_prefix": one.answer_prefix, "outputs": [*one.outputs], "gold": one.gold}
    assert turns[0] == first
    assert [turn for turn in turns if "control" in turn] == ([{**first, "control": True}] if task.control else [])


def test_turns_fit_with_answers_as_long_as_they_may_be():
    one = make(MultiTurn(turns=4), encode=characters)
    answer = "x" * one.gen_tokens
    text = one.context + "".join(t["question"] + t["answer_prefix"] + answer for t in one.meta["turns"])
    assert len(text) == all_turns(one, characters) <= 3000
    longer = replace(one, gen_tokens=one.gen_tokens + 1)
    assert all_turns(longer, characters) == len(text) + 5


def test_asked_keys_stand_anywhere_in_the_context():
    asked = (make(MultiTurn(), length=1000, index=i) for i in range(60))
    places = [one.context.index(one.outputs[0]) / len(one.context) for one in asked]
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() >= 5
