"""Lossless recycling gives what full decoding gives: texts, caches and distributions, whoever drafts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from recycled_jax.config import LlamaConfig
from recycled_jax.decode import begin
from recycled_jax.drafting import LONGEST
from recycled_jax.generate import generate, read, run_block, start
from recycled_jax.lossless import begin_rounds, joined, run_rounds
from recycled_jax.policies import make_policy
from recycled_jax.prefill.registry import make_prefill
from recycled_jax.sampling import Sampling
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

NEW, DRAFT, CAPACITY = 13, 4, 128
FULL = make_policy("full")
RECYCLED = make_policy("recycled", k=12)
TIDAL = make_policy("tidal", k=16, dense_layers=(0,), selection_layers=(1,))
DRAFTERS = [
    RECYCLED,
    make_policy("recycled-dynamic", k=12, stride=2, threshold=0.5),
    TIDAL,
    make_policy("quest", k=12, page=4, dense_layers=(0,)),
    make_policy("streaming", k=12),
    make_policy("random", k=12),
]
STATIC = {"sampling": Sampling(), "coverage": False, "implementation": None}


@functools.cache
def ragged():
    """200 prompts that have been read, of many lengths; some leave just the slots that their texts need."""
    lengths = [*np.random.default_rng(0).integers(1, 80, size=190).tolist(), *[CAPACITY - NEW] * 10]
    return read(*tiny_model(), prompts(*lengths), max_new_tokens=NEW, capacity=CAPACITY, chunk=16)


def begin_loop(policy):
    prefilled = ragged()
    return start(
        tiny_model()[0],
        prefilled.cache,
        prefilled.prompts,
        jax.random.key(0),
        policy=policy,
        sampling=Sampling(),
        implementation=None,
    )[0]


@functools.cache
def decoded_in_full():
    """The state, tokens [batch, steps] and log-probabilities after the first token."""
    loop, limit = begin_loop(FULL), jnp.int32(NEW - 1)
    state, block = run_block(*tiny_model(), loop, limit, policy=FULL, steps=NEW - 1, stride=None, **STATIC)
    return state.decode, np.asarray(block.tokens).T, np.asarray(block.log_probs).T


@pytest.mark.parametrize("policy", DRAFTERS, ids=lambda policy: policy.name)
def test_tokens_and_cache_are_those_of_full_decoding(policy):
    state = begin_rounds(begin_loop(policy), jnp.full(200, NEW - 1), draft=DRAFT, adapt=False)
    # more rounds than can be: those that are left do nothing
    state, given = run_rounds(*tiny_model(), state, policy=policy, draft=DRAFT, adapt=False, rounds=NEW, **STATIC)
    block = joined(given)
    dense, tokens, log_probs = decoded_in_full()
    np.testing.assert_array_equal(np.asarray(block.tokens[: NEW - 1]).T, tokens)
    np.testing.assert_allclose(np.asarray(block.log_probs[: NEW - 1]).T, log_probs, atol=3e-5)
    assert not np.any(state.active) and block.steps.tolist() == [NEW - 1] * 200
    ours = state.loop.decode
    np.testing.assert_array_equal(ours.lengths, dense.lengths)
    assert max(ours.lengths.tolist()) == CAPACITY - 1  # the last token is given and not read
    in_use = (np.arange(CAPACITY)[None, :] < np.asarray(dense.lengths)[:, None])[:, None, :, None]
    for layer in range(CONFIG.layers):
        for stored in ("keys", "values"):
            here, there = (np.asarray(getattr(of.cache, stored)(layer)) for of in (ours, dense))
            np.testing.assert_allclose(np.where(in_use, here, 0), np.where(in_use, there, 0), atol=1e-5)
    accepted, drafted = np.asarray(given.accepted), np.asarray(given.drafted)
    ran = accepted >= 0
    assert np.any(accepted[ran] == DRAFT) and np.any((accepted < drafted)[ran])  # whole drafts stood, others did not
    assert np.sum(np.asarray(given.near_ties)[ran]) == 0
    np.testing.assert_array_equal(np.sum(np.where(ran, accepted + 1, 0), axis=0), NEW - 1)


@pytest.mark.parametrize("policy", [DRAFTERS[0], *DRAFTERS[3:5]], ids=lambda policy: policy.name)
def test_a_method_goes_on_as_if_the_text_had_been_read(policy):
    """Selections, bounds of pages and a recent window, with nothing left of tokens that were refused."""
    model, params = tiny_model()
    rows = prompts(40, 9, 23)
    read_rows = functools.partial(read, model, params, policies=[policy], max_new_tokens=1, capacity=CAPACITY, chunk=16)
    prefilled, options = read_rows(rows), {"policy": policy, "sampling": Sampling(), "implementation": None}
    loop, (token, _) = start(model, prefilled.cache, prefilled.prompts, jax.random.key(0), **options)
    texts = [[*row, int(first)] for row, first in zip(rows, token, strict=True)]
    state = begin_rounds(loop, jnp.full(3, 50), draft=DRAFT, adapt=False)
    state, given = run_rounds(model, params, state, draft=DRAFT, adapt=False, rounds=2, coverage=False, **options)
    assert np.any(np.asarray(given.accepted) < DRAFT) and np.any(np.asarray(given.accepted) > 0)
    block = joined(given)
    texts = [text + block.tokens[: block.steps[row], row].tolist() for row, text in enumerate(texts)]
    expected = begin(policy, read_rows([text[:-1] for text in texts]))
    ours, fresh = state.loop.decode.kept, expected.kept
    if policy.name == "streaming":  # entries are overwritten in turn, so they stand in another order
        ours, fresh = (jnp.sort(of.selection.positions, axis=-1) for of in (ours, fresh))
    selecting = [layer for role, run in policy.method.runs(CONFIG.layers) if role == "select" for layer in run]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_allclose(np.asarray(a)[selecting], np.asarray(b)[selecting], atol=1e-5)


def run(rows, *, policy=RECYCLED, config=CONFIG, **options):
    model, params = tiny_model()
    options = {"max_new_tokens": NEW, "chunk": 16, "lossless": True, "draft": DRAFT} | options
    return generate(model.clone(config=config), params, rows, policy=policy, **options)


@pytest.mark.parametrize("policy", [FULL, TIDAL], ids=lambda policy: policy.name)
def test_rows_end_inside_a_draft_at_its_end_and_behind_it(policy):
    config = dataclasses.replace(CONFIG, eos_ids=(5, 11, 17))
    model, params = tiny_model()
    model = model.clone(config=config)
    options = {"max_new_tokens": NEW}
    expected = generate(model, params, ragged(), policy=FULL, **options)
    done = generate(model, params, ragged(), policy=policy, lossless=True, draft=DRAFT, **options)
    assert done.tokens == expected.tokens and done.stop == expected.stop
    assert done.telemetry.steps.tolist() == [len(row) - 1 for row in done.tokens]
    if policy is FULL:  # all that it drafts stands, so a round gives 4 tokens of the draft and one behind it
        places = {(len(row) - 2) % (DRAFT + 1) for row in done.tokens if row[-1] in config.eos_ids and len(row) > 1}
        assert places == set(range(DRAFT + 1))


def test_rows_are_what_they_are_alone():
    rows, hot = prompts(40, 9, 23), Sampling(temperature=1.2, top_k=20)
    both, alone = run(rows, sampling=hot), run(rows[:1], sampling=hot)
    assert alone.tokens == both.tokens[:1]
    count = alone.rounds.counts()[0]
    np.testing.assert_array_equal(alone.rounds.accepted[:, 0], both.rounds.accepted[:count, 0])
    assert alone.telemetry.kv_bytes_per_token()[0] == both.telemetry.kv_bytes_per_token()[0]


def test_whoever_looks_sees_the_same_text():
    rows, seen = prompts(40, 9, 23), [[], [], []]

    def collect(new):
        for row, tokens in enumerate(new):
            seen[row] += tokens

    assert run(rows, block=1, on_block=collect).tokens == seen == run(rows).tokens


def test_drafts_stop_where_the_text_must():
    done = run(prompts(CAPACITY - 9), policy=FULL, max_new_tokens=9, capacity=CAPACITY, draft=6)
    assert done.rounds.drafted.tolist() == [[6], [0]]  # 1 + (6 + 1) + (0 + 1) tokens
    assert done.tokens == run(prompts(CAPACITY - 9), policy=FULL, max_new_tokens=9, lossless=False).tokens
    assert run(prompts(4), max_new_tokens=1).rounds.counts().tolist() == [0]


def test_drafts_adapt_to_what_stands():
    done = run(prompts(11), policy=FULL, max_new_tokens=50, draft="auto")
    assert done.rounds.drafted.tolist() == [[4], [8], [LONGEST], [LONGEST], [0]]
    rows = prompts(40, 9, 23)
    adapted = run(rows, draft="auto", max_new_tokens=30)
    assert adapted.tokens == run(rows, policy=FULL, lossless=False, max_new_tokens=30).tokens
    drafted, accepted = adapted.rounds.drafted, adapted.rounds.accepted
    for row, count in enumerate(adapted.rounds.counts()):
        for index in range(count - 2):  # the last ones are short because the text ends
            d, a = drafted[index, row], accepted[index, row]
            assert drafted[index + 1, row] == (min(2 * d, LONGEST) if a == d else a + 1)


def test_bytes_by_hand():
    done = run(prompts(40), policy=make_policy("recycled", k=8, stride=8))
    slots, length = 0, 40
    for drafted, accepted in zip(done.rounds.drafted[:, 0], done.rounds.accepted[:, 0], strict=True):
        # the draft's steps read 8 slots, the pass all of them, the new selection 8 to copy them
        slots += 8 * drafted + (length + drafted + 1) + 8
        length += accepted + 1
    assert length == 40 + NEW - 1
    per_slot = 3 * 2 * 2 * 8 * 4  # layers, keys and values, kv heads, channels, bytes
    telemetry, rounds = done.telemetry, done.rounds
    assert telemetry.kv_bytes_per_token()[0] * (NEW - 1) == pytest.approx(slots * per_slot)
    assert telemetry.refreshes().tolist() == [[len(rounds.drafted)]] * 3
    assert rounds.mean_accepted()[0] == pytest.approx((NEW - 1) / len(rounds.drafted) - 1)
    assert rounds.acceptance()[0] == pytest.approx(rounds.accepted.sum() / rounds.drafted.sum())
    assert rounds.distribution() @ np.arange(len(rounds.distribution())) == rounds.accepted.sum()
    full = sum(range(41, 41 + NEW - 1)) * per_slot + (NEW - 1) * 1000
    passes = rounds.drafted.sum() + len(rounds.drafted)
    assert rounds.ideal_speedup(telemetry, 1000) == pytest.approx(full / (slots * per_slot + passes * 1000))


def test_sampled_texts_are_distributed_as_those_of_full_decoding():
    config = LlamaConfig(vocab=4, embed=8, mlp=8, layers=1, query_heads=2, kv_heads=1, head_dim=4, max_length=256)
    model, params = tiny_model(config)
    sampling, prompt, rows = Sampling(temperature=2.5), [0, 1, 2, 3, 3, 1, 0, 2, 1], 5_000
    prefilled = read(model, params, [prompt] * rows, max_new_tokens=3, chunk=16)
    policy = make_policy("random", k=2)
    options = {"policy": policy, "max_new_tokens": 3, "sampling": sampling, "lossless": True, "draft": 2}
    done = [generate(model, params, prefilled, seed=seed, **options) for seed in range(10)]
    found = np.array([row for of_seed in done for row in of_seed.tokens]) @ [16, 4, 1]
    sequences = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    texts = jnp.asarray(np.concatenate([np.tile(prompt, (64, 1)), sequences], axis=1))
    logits = np.asarray(model.apply(params, texts), np.float64)[:, len(prompt) - 1 : -1] / sampling.temperature
    chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    exact = np.take_along_axis(chances, sequences[..., None], axis=-1)[..., 0].prod(axis=1)
    assert exact.min() * len(found) > 5
    assert chisquare(np.bincount(found, minlength=64), exact / exact.sum() * len(found)).pvalue > 0.01
    assert 0.2 < np.mean([of_seed.rounds.acceptance().mean() for of_seed in done]) < 0.95  # both sides of the rule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": make_policy("streaming", k=8, keep_cache=False)}, "'streaming' drops the full cache"),
        ({"policy": make_policy("tidal", k=8, correct_every=4)}, "correct_every=4 is of no use with lossless=True"),
        (
            {"policy": dataclasses.replace(RECYCLED, prefill=make_prefill("vertical-slash"))},
            "are not those of full attention; lossless=True expects a dense prefill",
        ),
        ({"draft": 0}, "draft=0 must be at least 1 token, or 'auto'"),
        ({"loop": "nested"}, "lossless=True needs loop='cond' and no fed tokens, got loop='nested'"),
        ({"fed": [[1]]}, "fed tokens for 1 rows"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        run(prompts(5), **options)
