"""Which drafted tokens stand: the greedy rule by hand, the sampled one by the distribution of what it gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from recycled_jax.acceptance import accept_greedy, accept_sampled, near_ties, probabilities
from recycled_jax.sampling import Sampling, sample

SEQUENCES, VOCAB, LENGTH, DRAFT = 50_000, 4, 3, 2


def one_hot(*tokens):
    return 5.0 * jnp.eye(4)[jnp.array(tokens)]


def test_greedy_by_hand():
    model = jnp.stack([one_hot(1, 2, 3)] * 5)  # the model's choice in each column, the last one after the draft
    drafted = jnp.array([[1, 2], [1, 0], [0, 2], [1, 2], [1, 2]])
    counts = jnp.array([2, 2, 2, 1, 0])
    accepted, following = accept_greedy(drafted, counts, model)
    assert accepted.tolist() == [2, 1, 0, 1, 0]
    assert following.tolist() == [3, 2, 1, 2, 1]


def table(seed: int) -> jax.Array:
    """Probabilities of the next token after each token."""
    return jnp.asarray(np.random.default_rng(seed).dirichlet(np.full(VOCAB, 1.5), size=VOCAB), jnp.float32)


@functools.partial(jax.jit, static_argnames="rule")
def sequences(key, rule):
    """`LENGTH` tokens after token 0, in rounds of drafts from one table that another verifies; [sequences, length]."""
    model, drafter = table(0), table(1)
    rows = jnp.arange(SEQUENCES)

    def one_round(index, carry):
        text, given, token = carry
        of_draft, of_rule = jax.random.split(jax.random.fold_in(key, index))
        drafted = [token]
        for column in range(DRAFT):
            chances = jnp.log(drafter[drafted[-1]])
            drafted.append(jax.random.categorical(jax.random.fold_in(of_draft, column), chances))
        tokens = jnp.stack(drafted, axis=1)
        counts = rows % (DRAFT + 1)  # some rows draft less, or nothing
        accepted, following = rule(of_rule, tokens[:, 1:], counts, drafter[tokens[:, :-1]], model[tokens])
        for column in range(DRAFT + 1):
            new = jnp.where(column < accepted, tokens[:, min(column + 1, DRAFT)], following)
            place = jnp.where(column <= accepted, given + column, LENGTH)  # past the end: nothing is written
            text = text.at[rows, place].set(new, mode="drop")
        return text, given + accepted + 1, following

    nothing = jnp.zeros(SEQUENCES, jnp.int32)
    return jax.lax.fori_loop(0, LENGTH, one_round, (jnp.zeros((SEQUENCES, LENGTH), jnp.int32), nothing, nothing))[0]


def p_value(rule) -> float:
    """Of the sequences that a rule gives, if they were the model's."""
    model = np.asarray(table(0), np.float64)
    model /= model.sum(axis=1, keepdims=True)
    exact = np.einsum("a,ab,bc->abc", model[0], model, model).ravel()
    found = np.asarray(sequences(jax.random.key(3), rule)) @ np.array([VOCAB**2, VOCAB, 1])
    assert exact.min() * SEQUENCES > 5
    return chisquare(np.bincount(found, minlength=VOCAB**LENGTH), exact * SEQUENCES).pvalue


def taking_all(key, drafted, counts, draft, target):
    wanted = target[jnp.arange(len(drafted)), counts]
    return counts, jax.random.categorical(key, jnp.log(wanted)).astype(jnp.int32)


def keeping_the_drafters_share(key, drafted, counts, draft, target):
    """A refused token is drawn from the model's probabilities as they are."""
    accepted, _ = accept_sampled(key, drafted, counts, draft, target)
    wanted = target[jnp.arange(len(drafted)), accepted]
    return accepted, jax.random.categorical(jax.random.fold_in(key, 7), jnp.log(wanted)).astype(jnp.int32)


def test_sampled_sequences_are_the_models():
    assert p_value(accept_sampled) > 0.01


@pytest.mark.parametrize("wrong", [taking_all, keeping_the_drafters_share])
def test_a_wrong_rule_is_found_out(wrong):
    assert p_value(wrong) < 1e-6


def test_what_the_model_never_says_never_stands():
    draft = jnp.full((64, 1, 4), 0.25)
    target = jnp.broadcast_to(jnp.array([0.0, 0.5, 0.5, 0.0]), (64, 2, 4))
    drafted = jnp.tile(jnp.array([0, 1, 2, 3]), 16)[:, None]
    accepted, following = accept_sampled(jax.random.key(0), drafted, jnp.ones(64, jnp.int32), draft, target)
    assert accepted.tolist() == [0, 1, 1, 0] * 16
    assert set(following.tolist()) == {1, 2}


def test_a_row_draws_by_its_place():
    draft, target = (table(seed)[None, :2].repeat(3, 0) for seed in (1, 0))
    target = jnp.concatenate([target, target[:, :1]], axis=1)
    arguments = jnp.zeros((3, 2), jnp.int32), jnp.full(3, 2), draft, target
    whole = accept_sampled(jax.random.key(5), *arguments)
    assert [x[0] for x in accept_sampled(jax.random.key(5), *(x[:1] for x in arguments))] == [x[0] for x in whole]


def test_probabilities_are_those_of_sample():
    sampling = Sampling(temperature=0.7, top_k=3, top_p=0.9)
    logits = jnp.array([2.0, 1.5, 0.0, -1.0, 1.4])
    draws, _ = sample(sampling, jnp.broadcast_to(logits, (20_000, 5)), jax.random.key(0))
    exact = np.asarray(probabilities(sampling, logits[None, None])[0, 0], np.float64)
    assert (exact > 0).tolist() == [True, True, False, False, True]
    counts = np.bincount(np.asarray(draws), minlength=5)
    assert chisquare(counts[exact > 0], exact[exact > 0] / exact.sum() * 20_000).pvalue > 0.01


def test_near_ties_by_hand():
    unit = float(jnp.finfo(jnp.float32).eps)
    logits = jnp.array([[4.0, 4.0 + 16 * unit, 1.0], [4.0, 4.0 + 64 * unit, 1.0], [0.25, 0.25, -1.0]])
    assert near_ties(logits, jnp.dtype(jnp.float32)).tolist() == [True, False, True]
    assert near_ties(logits, jnp.dtype(jnp.bfloat16)).tolist() == [True, True, True]
