"""What the harness's requests become: windows, batches, stops, settings and arguments. The harness is not needed."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycled_jax.commands.lm_eval import run_harness
from recycled_jax.lm_eval_plugin.args import AUTOMATIC_BATCH, ModelArgs
from recycled_jax.lm_eval_plugin.windows import (
    Row,
    Settings,
    Stops,
    Watch,
    batches,
    fit_prompt,
    fit_row,
    rounded,
    stop_strings,
)

WORDS = ["ab", "c. ", "Q", "ue", "stion", ": x", "</s>"]
GREEDY = {"until": [], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}


def text(tokens):
    return "".join(WORDS[token] for token in tokens)


@pytest.mark.parametrize(
    ("strings", "ids", "answer"),
    [
        (["Question:"], [], "abc. "),  # four tokens, and begins and ends within none of its own
        (["b"], [], "a"),
        (["e", "b"], [], "a"),  # the first in the text, not in the list
        (["nothing"], [], "abc. Question: x"),
        ([], [4], "abc. Que"),
        (["st"], [2], "abc. "),
    ],
)
def test_an_answer_ends_at_its_first_stop(strings, ids, answer):
    stops = Stops(tuple(strings), frozenset(ids), text)
    assert stops.answer([0, 1, 2, 3, 4, 5]) == answer
    assert stops.reached([0, 1, 2, 3, 4, 5]) == (answer != "abc. Question: x")


def test_a_batch_is_watched_until_its_last_row_has_stopped():
    watch = Watch([Stops(("Question",), frozenset({6}), text), Stops(("c",), frozenset({6}), text)])
    assert not watch([[2], [0]])
    assert not watch([[3], [1]])  # the second row has stopped
    assert watch([[4], [0]])  # "Q" + "ue" + "stion"
    assert watch([[0], [0]])
    of_ids = Watch([Stops(("Question",), frozenset({6}), text)])
    assert not of_ids([[0]]) and of_ids([[6]])


@pytest.mark.parametrize(
    ("until", "strings"),
    [(None, ()), ("\n", ("\n",)), (["a", "", "b"], ("a", "b")), ([None], ()), ("", ())],
    ids=repr,
)
def test_until_is_a_string_a_list_or_nothing(until, strings):
    assert stop_strings(until) == strings


def test_until_refuses_what_is_not_text():
    with pytest.raises(ValueError, match="setting until holds 3, expected strings"):
        stop_strings(["a", 3])


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 50))), st.integers(1, 5))
def test_batches_hold_every_request_once_and_alike(requests, size):
    keys, lengths = [key for key, _ in requests], [length for _, length in requests]
    found = list(batches(keys, lengths, size))
    assert sorted(index for batch in found for index in batch) == list(range(len(requests)))
    for batch in found:
        assert 1 <= len(batch) <= size and len({keys[index] for index in batch}) == 1
    for key in set(keys):
        ordered = [lengths[index] for batch in found for index in batch if keys[index] == key]
        assert ordered == sorted(ordered, reverse=True)
        assert sum(keys[batch[0]] == key for batch in found) == -(-keys.count(key) // size)


@given(st.integers(1, 300_000), st.sampled_from([8, 128]))
def test_rounded_lengths_are_few_and_near(tokens, least):
    assert tokens <= rounded(tokens, least) <= tokens * 9 / 8 + least
    assert rounded(tokens, least) % least == 0
    assert rounded(rounded(tokens, least), least) == rounded(tokens, least)


def test_a_thousand_lengths_round_to_a_dozen():
    assert len({rounded(tokens, 128) for tokens in range(3000, 4000)}) <= 6


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_what_does_not_fit_is_lost_on_the_left(context, continuation, max_length):
    before, after = list(range(context)), list(range(100, 100 + continuation))
    if continuation > max_length:
        with pytest.raises(ValueError, match=f"has {continuation} tokens, expected from 1 to max_length={max_length}"):
            fit_row(before, after, max_length=max_length)
        return
    row, lost = fit_row(before, after, max_length=max_length)
    whole = before + after
    assert row == Row([*row.context], after) and row.context
    assert row.context + row.continuation == whole[-(max_length + 1) :]
    assert lost == (len(whole) > max_length + 1)


def test_a_prompt_leaves_room_for_its_answer():
    assert fit_prompt([1, 2, 3, 4], max_gen_toks=6, max_length=10) == ([1, 2, 3, 4], False)
    assert fit_prompt([1, 2, 3, 4], max_gen_toks=7, max_length=10) == ([2, 3, 4], True)
    with pytest.raises(ValueError, match="max_gen_toks=10 leaves no room for a prompt in max_length=10"):
        fit_prompt([1], max_gen_toks=10, max_length=10)
    with pytest.raises(ValueError, match="a continuation has 0 tokens, expected from 1"):
        fit_row([1], [], max_length=10)


def test_settings_are_greedy_unless_sampling_is_asked_for():
    assert Settings.of({**GREEDY, "top_p": 0.9, "num_beams": 1}) == Settings(8, 0.0, None, None)
    sampled = {**GREEDY, "do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9}
    assert Settings.of(sampled) == Settings(8, 0.7, None, 0.9)
    del sampled["temperature"]
    assert Settings.of(sampled) == Settings(8, 1.0, None, 0.9)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 4}, "generation setting num_beams=4 is not implemented"),
        ({"untill": ["x"]}, r"untill=\['x'\] is not implemented; did you mean 'until'"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be at least 1"),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name(asked, message):
    with pytest.raises(ValueError, match=message):
        Settings.of({**GREEDY, **asked})


def test_arguments_come_with_knobs_or_as_a_mapping():
    flat = ModelArgs.parse({"policy": "recycled", "policy.k": 64, "batch_size": "8", "device": "cuda:0", "dtype": None})
    assert flat == ModelArgs.parse({"policy": {"name": "recycled", "k": 64}, "batch_size": 8})
    assert flat.all_knobs() == {
        "name": "recycled",
        "k": 64,
        "stride": 10,
        "refresh": "full",
        "pool": 7,
        "group_reduction": "max",
    }
    assert ModelArgs.parse({}).policy.name == "recycled"
    assert ModelArgs.parse({"batch_size": "auto:2"}).batch_size == AUTOMATIC_BATCH
    assert ModelArgs.parse({"batch_size": "auto", "max_batch_size": 3}).batch_size == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"polcy": "full"}, "model argument polcy='full' is unknown; did you mean 'policy'"),
        ({"policy": "recycle"}, "policy='recycle' is unknown; did you mean 'recycled'"),
        ({"policy": "full", "policy.k": 3}, "policy.k is not a knob of 'full'"),
        ({"policy.k": "many"}, "policy.k is 'many', expected int"),
        ({"batch_size": "some"}, "batch_size is 'some', expected int"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_length": -1}, "max_length=-1 must be at least 1"),
        ({"scoring": "guess"}, r"scoring is 'guess', expected decode \| prefill \| none"),
        ({"dtype": "int8"}, "dtype is 'int8', expected float32"),
        ({"seed": -1}, "seed=-1 must be between 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        ModelArgs.parse(arguments)
    assert "\n" not in str(caught.value)


def test_the_digest_changes_with_what_changes_answers():
    def digest(**arguments):
        return ModelArgs.parse(arguments).digest("/models/a", 4096)

    assert digest() == digest(batch_size=4) == digest(**{"policy.stride": 10}) != digest(**{"policy.stride": 20})
    assert len({digest(), digest(dtype="bfloat16"), digest(scoring="prefill"), digest(seed=1)}) == 4
    assert digest() != ModelArgs.parse({}).digest("/models/b", 4096)


def test_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"needs lm_eval\S*, which is missing: pip install 'recycled-jax\[eval\]'"):
        run_harness(["ls", "tasks"])
