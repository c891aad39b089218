"""Metrics against scores worked out by hand, and intervals."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from eval.metrics import METRICS, clean, interval, paired_interval
from eval.row_f1 import normalised, row_f1

FRANCE = ["France", "in France", "the country of France"]

# answer, references, score by all, score by part
MATCHES = [
    ("It is 1234567.", ["1234567"], 100, 100),
    ("It is 1234568.", ["1234567"], 0, 0),
    ("12345678", ["1234567"], 100, 100),  # part of a longer number counts, as in RULER
    ("11, 22 and 44", ["11", "22", "33", "44"], 75, 100),
    ("none of them", ["11", "22", "33", "44"], 0, 0),
    ("It was in France.", FRANCE, 200 / 3, 100),  # NVIDIA scores it 100, lm-evaluation-harness 67
    ("PARIS and rome", ["Paris", "ROME"], 100, 100),
    ("ÉCOLE", ["école"], 100, 100),
    ("red\tfox", ["red\nfox"], 100, 100),  # control characters become line ends, not nothing
    ("red\x00fox", ["redfox"], 0, 0),
    ("red\nfox", ["red fox"], 0, 0),
    ("red\x7ffox", ["redfox"], 0, 0),  # delete is none of those that RULER replaces
    ("", ["11"], 0, 0),
    (" \x00\x1f\n", ["\n"], 0, 0),  # nothing is left of the answer
    ("11 11", ["11", "11", "22"], 200 / 3, 100),  # a reference listed twice counts twice
    ("22", ["11", "11", "22"], 100 / 3, 100),
]


@pytest.mark.parametrize("answer, outputs, by_all, by_part", MATCHES)
def test_matches_of_substrings(answer, outputs, by_all, by_part):
    assert METRICS["all"](answer, outputs, {}) == {"score": pytest.approx(by_all)}
    assert METRICS["part"](answer, outputs, {}) == {"score": by_part}
    assert METRICS["part_lmeval"](answer, outputs, {}) == {"score": pytest.approx(by_all)}


TEXT = st.text("aAbB \n\x00", max_size=6)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=4))
def test_part_is_whether_all_finds_anything(answer, outputs):
    by_all = METRICS["all"](answer, outputs, {})["score"]
    assert METRICS["part"](answer, outputs, {})["score"] == (100 if by_all > 0 else 0)
    assert METRICS["all"](" ".join(outputs) + answer, [clean(outputs[0]).upper()], {})["score"] == 100


@pytest.mark.parametrize(
    "answer, cleaned",
    [("  a b ", "a b"), ("\x00 a\x01\tb \x1f", "a\n\nb"), ("\r\n", ""), ("\x01", ""), ("a\x85b", "a\x85b")],
)
def test_cleaning(answer, cleaned):
    assert clean(answer) == cleaned


@pytest.mark.parametrize(
    "answer, score",
    [
        ("The pass key is 12345.", 100),
        ("12345 or 54321", 100),
        ("54321 or 12345", 0),
        ("123456", 0),
        ("12,345", 0),
        ("012345", 100),
        ("9" * 5000, 0),
        ("key-12345", 100),
        ("no number", 0),
        ("", 0),
    ],
)
def test_passkey_is_the_first_integer(answer, score):
    assert METRICS["passkey"](answer, ["12345"], {}) == {"score": score}


# one cycle: red-fox, fox-sun, sun-oak, oak-ice, ice-red
KEYS = ["sun-oak", "red-fox", "ice-red", "fox-sun", "oak-ice"]


@pytest.mark.parametrize(
    "answer, start, score",
    [
        ("red-fox, fox-sun, sun-oak, oak-ice", None, 100),
        ("sun-oak, oak-ice, ice-red, red-fox", None, 100),  # any key may come first
        ("sun-oak, oak-ice, ice-red, red-fox", "red", 0),
        ("red-fox, fox-sun, sun-oak, oak-ice", "red", 100),
        ("red-fox, fox-sun, sun-oak, oak-ice, ice-red", None, 100),
        ("red-fox, fox-sun, sun-oak, oak-ice, never-heard", None, 100),  # what follows the chain is not read
        ("red-fox, fox-sun, oak-ice, ice-red", None, 50),  # a valid key that does not continue
        ("red-fox, fox-ice, ice-red, red-fox", None, 25),  # a continuation that is no key
        ("red-fox, red-fox, fox-sun, sun-oak", None, 25),
        ("fox-red, red-fox, fox-sun, sun-oak", None, 0),  # the rest does not make up for the first
        ("red-fox, fox-sun", None, 50),
        ("Red-Fox,FOX-SUN,\nsun-oak\noak-ice.", "RED", 100),
        ("red-fox fox-sun sun-oak oak-ice", None, 0),
        ("red-fox, fox", None, 25),
        ("", None, 0),
        (",,", "red", 0),
    ],
)
def test_chain_of_key_counts_the_valid_keys_in_front(answer, start, score):
    meta = {"keys": KEYS, "chain": 4, "start": start}
    assert METRICS["chain_of_key"](answer, (), meta) == {"score": score}


def test_the_last_of_several_words_is_what_the_next_key_begins_with():
    meta = {"keys": ["red-old-fox", "fox-big-sun", "old-big-fox"], "chain": 2, "start": None}
    assert METRICS["chain_of_key"]("red-old-fox, fox-big-sun", (), meta) == {"score": 100}
    assert METRICS["chain_of_key"]("red-old-fox, old-big-fox", (), meta) == {"score": 50}


GOLD = "name\tprice\nAnn\t1\nBob\t2\nCleo\t3\nDan\t4"


def rows(*lines: str) -> str:
    return "\n".join(["name\tprice", *lines])


def fenced(text: str) -> str:
    return f"Here it is:\n```tsv\n{text}\n```\nThat is all.\tReally."


# answer → score, row_f1_set, rows_predicted, repeat_share, parsed, precision, recall
TABLES = {
    "right": (fenced(GOLD), 100, 100, 4, 0, 1, 100, 100),
    "without a fence": (GOLD + "\n\n", 100, 100, 4, 0, 1, 100, 100),
    "the fence closes only": (GOLD + "\n```\nThat is all.\tReally.", 100, 100, 4, 0, 1, 100, 100),
    "windows line ends": (fenced(GOLD).replace("\n", "\r\n"), 100, 100, 4, 0, 1, 100, 100),
    "another order": (fenced(rows("Dan\t4", "Ann\t1", "Cleo\t3", "Bob\t2")), 100, 100, 4, 0, 1, 100, 100),
    "unclosed": ("So:\n```TSV\n" + rows("Ann\t1", "Bob\t2"), 200 / 3, 200 / 3, 2, 0, 1, 100, 50),
    "last row cut off": ("```tsv\n" + rows("Ann\t1", "Bob\t2", "Cle"), 200 / 3, 200 / 3, 2, 0, 1, 100, 50),
    "last row cut off in its last cell": ("```tsv\n" + rows("Ann\t1", "Bob\t"), 100 / 3, 100 / 3, 2, 0, 1, 50, 25),
    # F1 of 2/3 and 2/4
    "malformed in the middle": (fenced(rows("Ann\t1", "Cleo", "Bob\t2")), 400 / 7, 400 / 7, 3, 0, 1, 200 / 3, 50),
    "an empty line is a row": (fenced(rows("Ann\t1", "", "Bob\t2")), 400 / 7, 400 / 7, 3, 0, 1, 200 / 3, 50),
    # one right row four times: 1/4 of it counts here, all of it in the version with sets
    "looping": (fenced(rows(*["Ann\t1"] * 4)), 25, 40, 4, 0.75, 1, 25, 25),
    "looping on what is wrong": (fenced(rows(*["Eve\t9"] * 5)), 0, 0, 5, 0.8, 1, 0, 0),
    "a wrong cell": (fenced(rows("Ann\t1", "Bob\t3")), 100 / 3, 100 / 3, 2, 0, 1, 50, 25),
    "a column too many": (fenced("name\tprice\tx\nAnn\t1\t0\nBob\t2\t0"), 0, 0, 2, 0, 0, 0, 0),
    # right rows under a header of another width are malformed
    "a wrong header": (fenced("name\nAnn\t1\nBob\t2\nCleo"), 0, 0, 3, 0, 0, 0, 0),
    "only a header": (fenced("name\tprice"), 0, 0, 0, 0, 0, 0, 0),
    "prose": ("I cannot find a table.", 0, 0, 0, 0, 0, 0, 0),
    "nothing": ("", 0, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_tables(name):
    answer, score, by_set, predicted, repeats, parsed, precision, recall = TABLES[name]
    assert METRICS["row_f1"](answer, (GOLD,), {}) == pytest.approx(
        {
            "score": score,
            "row_f1_set": by_set,
            "rows_predicted": predicted,
            "repeat_share": repeats,
            "parsed": parsed,
            "precision": precision,
            "recall": recall,
        }
    )


def test_a_row_twice_in_both_tables_counts_twice():
    gold = rows("Ann\t1", "Ann\t1", "Bob\t2")
    twice = row_f1(rows("Ann\t1", "Ann\t1"), (gold,), {})
    once = row_f1(rows("Ann\t1"), (gold,), {})
    assert (twice["precision"], twice["recall"]) == pytest.approx((100, 200 / 3))
    assert (once["precision"], once["recall"]) == pytest.approx((100, 100 / 3))
    # recall by sets is 2/3 either way
    assert once["row_f1_set"] == twice["row_f1_set"] == pytest.approx(80)


def test_an_empty_cell_at_the_end_of_the_text_stays():
    gold = rows("Ann\t1", "Bob\t")
    assert row_f1(gold, (gold,), {})["rows_predicted"] == 2


@pytest.mark.parametrize(
    "cell, other",
    [
        ("The Red Fox Inn", "red fox inn"),
        ("A. N. Other", "an other"),  # punctuation goes first, and leaves "a n other"
        ("$1,250.00", "125000"),
        ("Smith & Sons", "smith sons"),  # what &amp; stands for
        ("Smith\xa0Sons", "smithsons"),  # what &nbsp; stands for
        ("  2024-05-01 ", "20240501"),
        ("Café", "café"),
    ],
)
def test_cells_equal_but_for_case_punctuation_articles_and_space(cell, other):
    same = normalised(cell) == normalised(other)
    assert same == (cell != "A. N. Other")
    assert row_f1(f"x\ty\n{cell}\t1", (f"x\ty\n{other}\t1",), {})["score"] == 100 * same


def test_entities_left_as_they_are_do_not_count_as_what_they_stand_for():
    assert normalised("Smith &amp; Sons") == "smithampsons"
    assert normalised("theatre in a band") == "theatreinband"  # articles are whole words


def test_a_reference_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"outputs\[0\]='name.tprice' has no rows, expected a table"):
        row_f1(GOLD, ("name\tprice",), {})


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from("123")), min_size=1, max_size=8), st.randoms())
def test_the_order_of_rows_does_not_matter(table, random):
    lines = [f"{name}\t{price}" for name, price in table]
    shuffled = random.sample(lines, len(lines))
    scores = row_f1(fenced(rows(*shuffled)), (rows(*lines),), {})
    assert scores["score"] == scores["row_f1_set"] == pytest.approx(100)
    assert scores["repeat_share"] == pytest.approx(1 - len(set(lines)) / len(lines))


def test_metrics_have_the_names_that_tasks_use():
    assert set(METRICS) == {"all", "part", "part_lmeval", "passkey", "chain_of_key", "row_f1"}


@given(st.lists(st.sampled_from([0.0, 25.0, 100 / 3, 100.0]), min_size=1, max_size=40), st.integers(0, 5))
@settings(max_examples=25)
def test_intervals_are_deterministic_and_hold_the_mean(scores, seed):
    low, high = interval(scores, seed=seed)
    assert (low, high) == interval(scores, seed=seed)
    assert min(scores) - 1e-9 <= low <= np.mean(scores) + 1e-9
    assert np.mean(scores) - 1e-9 <= high <= max(scores) + 1e-9


def test_an_interval_is_as_wide_as_the_normal_approximation_says():
    low, high = interval([100.0] * 900 + [0.0] * 100)
    assert (low, high) == pytest.approx((90 - 1.86, 90 + 1.86), abs=0.15)  # 1.96 · sqrt(90 · 10 / 1000)
    assert interval(np.arange(100.0), seed=1) != interval(np.arange(100.0))
    assert interval([50.0]) == (50, 50)


def test_differences_are_paired_by_example():
    ours, theirs = [100.0, 0.0] * 20, [90.0, -10.0] * 20
    assert paired_interval(ours, theirs) == pytest.approx((10, 10))  # though either mean alone is uncertain
    low, high = paired_interval(ours, theirs[::-1])
    assert low < -10 and high > 30
    low, high = paired_interval([50.0, 70.0, 90.0], [0.0, 0.0, 0.0])
    assert paired_interval([0.0, 0.0, 0.0], [50.0, 70.0, 90.0]) == pytest.approx((-high, -low))


def test_intervals_refuse_what_has_no_mean():
    with pytest.raises(ValueError, match="scores is empty, expected one number per example"):
        interval([])
    with pytest.raises(ValueError, match="theirs has 1 scores, expected 2 as in ours"):
        paired_interval([1.0, 2.0], [1.0])
