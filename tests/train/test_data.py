"""Batches of the retrieval mixture: what they depend on, and what each array marks."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycled_jax.tasks.prose import generated_sentences
from train.config import Data, Stage
from train.data import RetrievalMixture

STAGE = Stage(length=256, batch=4, steps=10, facts=5, text_weight=0.25, skip_share=1.0)


@pytest.fixture(scope="module")
def mixture(tokenizer):
    sentences = generated_sentences(np.random.default_rng(7), 100)
    return RetrievalMixture(Data(chain_share=0.3, max_position=2000), tokenizer, sentences, seed=3)


def same(left, right) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_batch_depends_on_seed_and_step_only(mixture, tokenizer):
    sentences = generated_sentences(np.random.default_rng(7), 100)
    batch = mixture.batch(5, STAGE)
    again, other = (RetrievalMixture(mixture.config, tokenizer, sentences, seed=seed) for seed in (3, 4))
    again.batch(0, STAGE)
    assert same(batch, again.batch(5, STAGE))
    assert not same(batch, mixture.batch(6, STAGE))
    assert not same(batch, other.batch(5, STAGE))


@settings(max_examples=40)
@given(length=st.integers(8, 700), batch=st.integers(1, 3), facts=st.integers(1, 12), step=st.integers(0, 10**6))
def test_rows_are_exactly_as_long_as_asked(mixture, length, batch, facts, step):
    made = mixture.batch(step, Stage(length=length, batch=batch, steps=1, facts=facts))
    assert [field.shape for field in made] == [(batch, length)] * 4
    assert [field.dtype.name for field in made] == ["int32", "int32", "float32", "bool"]


@settings(max_examples=30)
@given(length=st.integers(8, 2200), share=st.sampled_from([0.0, 1.0]), step=st.integers(0, 10**6))
def test_positions_increase_and_stay_below_the_limit(mixture, length, share, step):
    stage = dataclasses.replace(STAGE, length=length, skip_share=share, batch=2)
    positions = mixture.batch(step, stage).positions
    assert (np.diff(positions) >= 1).all() and (positions[:, 0] == 0).all()
    assert positions.max() < max(length, mixture.config.max_position)
    if share == 0:
        assert (positions == np.arange(length)).all()


def test_skips_reach_far(mixture):
    last = np.concatenate([mixture.batch(step, STAGE).positions[:, -1] for step in range(20)])
    assert last.max() > 0.9 * mixture.config.max_position and last.min() < 0.5 * mixture.config.max_position


def test_answers_are_those_of_the_facts_with_their_end_and_nothing_else(mixture, tokenizer):
    chains = 0
    for step in range(12):
        batch = mixture.batch(step, STAGE)
        for tokens, answers in zip(batch.tokens, batch.answers, strict=True):
            assert tokens[0] == tokenizer.bos_token_id and (tokens[1:] != tokenizer.bos_token_id).all()
            runs = [
                (bool(is_answer), tokens[[at for at, _ in run]])
                for is_answer, run in itertools.groupby(enumerate(answers), key=lambda item: item[1])
            ]
            assert [is_answer for is_answer, _ in runs] == [False, True] * (len(runs) // 2) and len(runs) >= 2
            context = tokenizer.decode(runs[0][1])
            for (_, asked), (_, answer) in itertools.batched(runs, 2):
                assert answer[-1] == tokenizer.eos_token_id and (answer[:-1] != tokenizer.eos_token_id).all()
                assert (asked != tokenizer.eos_token_id).all()
                said = tokenizer.decode(asked).rpartition("\n")[2] + tokenizer.decode(answer[:-1])
                chains += said.startswith("Which way")
                check_exchange(context, said)
    assert chains > 5


def check_exchange(context: str, said: str) -> None:
    """The exchange repeats facts of the context, and answers what it asked."""
    asked, sentence = said.split("? ", 1)
    facts = re.findall(r"The magic number for \w+ is \d+\.|From \w+ go to \w+\.", sentence)
    assert " ".join(facts) == sentence
    assert all(f" {fact}" in context for fact in facts)
    assert asked.split()[-1] == re.search(r"(?:for|From) (\w+)", sentence)[1]
    if asked.startswith("Which way"):
        hops = dict(re.findall(r"From (\w+) go to (\w+)\.", context))
        at = asked.split()[-1]
        for here, there in re.findall(r"From (\w+) go to (\w+)\.", sentence):
            assert here == at
            at = there
            assert hops[here] == there
        assert at not in hops  # to the end of the path


def test_weights_are_one_on_answers_small_on_filler_and_zero_on_facts_and_questions(mixture, tokenizer):
    batch = mixture.batch(0, STAGE)
    assert (batch.weights[batch.answers] == 1).all()
    assert set(np.unique(batch.weights[~batch.answers])) == {0.0, 0.25}
    for tokens, weights in zip(batch.tokens, batch.weights, strict=True):
        filler = tokenizer.decode(tokens[weights == 0.25])
        assert not re.search(r"\d|magic|From \w+ go to|\?", filler)
        assert len(filler) > 50


def test_texts_are_used_by_their_share(tokenizer):
    mixtures = [RetrievalMixture(Data(text_share=share), tokenizer, ["Xylophones."], seed=0) for share in (0.0, 1.0)]
    texts = [tokenizer.decode(mixture.batch(0, STAGE).tokens.ravel()) for mixture in mixtures]
    assert "Xylophones" not in texts[0]
    assert texts[1].count("Xylophones") > 50
