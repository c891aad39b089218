"""`generate` as its callers see it: stopping, sampling, telemetry, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycled_jax.generate import generate, read
from recycled_jax.policies import make_policy
from recycled_jax.sampling import Sampling, sample
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model

FULL = make_policy("full")
RECYCLED = make_policy("recycled", k=8, stride=4)


def run(rows, *, policy=FULL, config=CONFIG, **options):
    model, params = tiny_model()
    model = model.clone(config=config)
    return generate(model, params, rows, policy=policy, **{"max_new_tokens": 12, "chunk": 16, "block": 8} | options)


def test_greedy_tokens_are_the_models_first_choices():
    rows = prompts(11, 4)
    model, params = tiny_model()
    result = run(rows)
    for prompt, tokens, log_probs in zip(rows, result.tokens, result.log_probs, strict=True):
        logits = model.apply(params, jnp.asarray([prompt + tokens]))[0, len(prompt) - 1 : -1]
        assert np.argmax(logits, axis=-1).tolist() == tokens
        expected = jax.nn.log_softmax(logits)[np.arange(len(tokens)), np.array(tokens)]
        np.testing.assert_allclose(log_probs, expected, atol=1e-5)


def test_rows_stop_at_their_own_end_of_sequence():
    rows = prompts(11, 4)
    free = run(rows).tokens
    eos = free[0][5]
    config = dataclasses.replace(CONFIG, eos_ids=(eos,))
    stopped = run(rows, config=config)
    for row in range(2):
        cut = free[row].index(eos) + 1 if eos in free[row] else None
        assert stopped.tokens[row] == free[row][:cut]
        assert stopped.stop[row] == ("eos" if cut else "limit")
    assert stopped.telemetry.steps.tolist() == [len(tokens) - 1 for tokens in stopped.tokens]


@pytest.mark.parametrize("block", [1, 3, 64])
def test_block_size_changes_nothing(block):
    rows, seen = prompts(11, 4), [[], []]

    def collect(new):
        for row, tokens in enumerate(new):
            seen[row] += tokens

    result = run(rows, policy=RECYCLED, block=block, on_block=collect)
    assert result.tokens == run(rows, policy=RECYCLED).tokens == seen


def test_whoever_looks_may_end_it():
    free, seen = run(prompts(11, 4), block=2), []

    def enough(new):
        seen.append(new)
        return len(seen) == 3  # the first token, and two blocks

    ended = run(prompts(11, 4), block=2, on_block=enough)
    assert ended.tokens == [row[:5] for row in free.tokens]
    assert ended.telemetry.steps.tolist() == [4, 4]


def test_policies_share_a_prefill():
    rows = prompts(11, 4)
    model, params = tiny_model()
    prefilled = read(model, params, rows, max_new_tokens=12, chunk=16)
    for policy in (FULL, RECYCLED, FULL):
        shared = generate(model, params, prefilled, policy=policy, max_new_tokens=12, block=8)
        assert shared.tokens == run(rows, policy=policy).tokens
    with pytest.raises(ValueError, match="capacity=None and chunk=8 belong to prompts that are still to be read"):
        generate(model, params, prefilled, policy=FULL, max_new_tokens=12, chunk=8)
    with pytest.raises(ValueError, match="capacity=128 is too small for a prompt of 11 tokens and max_new_tokens=118"):
        generate(model, params, prefilled, policy=FULL, max_new_tokens=118)


@pytest.mark.parametrize("policy", [FULL, make_policy("recycled", k=8, stride=1)])
def test_fed_tokens_follow_the_prompt(policy):
    rows, questions = prompts(11, 4), [[5, 6, 7], [8, 9, 10, 11, 12]]
    whole = run([prompt + question for prompt, question in zip(rows, questions, strict=True)])
    result = run(rows, policy=policy, fed=questions)
    assert result.tokens == whole.tokens
    np.testing.assert_allclose(result.log_probs, whole.log_probs, atol=1e-5)
    assert result.telemetry.prompt_lengths.tolist() == [14, 9]
    model, params = tiny_model()
    prefilled = read(model, params, rows, max_new_tokens=17, chunk=16)
    assert generate(model, params, prefilled, policy=policy, max_new_tokens=12, fed=questions).tokens == whole.tokens


def test_a_fed_row_does_not_depend_on_the_others():
    rows, questions = prompts(11, 4), [[5, 6, 7], [8, 9, 10, 11, 12]]
    both = run(rows, policy=RECYCLED, fed=questions)
    for row in range(2):
        alone = run([rows[row]], policy=RECYCLED, fed=[questions[row]])
        assert alone.tokens == [both.tokens[row]]
        assert alone.telemetry.refreshes().tolist() == both.telemetry.refreshes()[:, [row]].tolist()


def test_density_by_hand():
    density = run(prompts(11, 4), policy=RECYCLED, max_new_tokens=5).telemetry.density()
    # steps 1 to 4 of stride 4: three read 8 slots of 12, 13, 14 and the fourth all 15; the short row has 5 to 8
    np.testing.assert_allclose(density, [(8 / 12 + 8 / 13 + 8 / 14 + 1) / 4, 1])


def test_one_token_needs_no_step():
    result = run(prompts(5), policy=RECYCLED, max_new_tokens=1)
    assert len(result.tokens[0]) == 1 and result.telemetry.steps.tolist() == [0]
    assert result.telemetry.kv_bytes_per_token().tolist() == [0]


def test_telemetry_counts_bytes_and_refreshes_by_hand():
    telemetry = run(prompts(20), policy=RECYCLED, max_new_tokens=10).telemetry
    # 9 steps, refreshes at 4 and 8, on 3 layers; lengths 21 ... 29; 2 kv heads x 8 channels x 4 bytes per slot
    assert telemetry.refreshes().tolist() == [[2]] * 3
    assert telemetry.effective_stride().tolist() == [[4.5]] * 3
    slots = 3 * (7 * 2 * 8 + (2 * 24 + 2 * 8) + (2 * 28 + 2 * 8))
    assert telemetry.kv_bytes_per_token() == pytest.approx(slots * 64 / 9)
    assert telemetry.dense_kv_bytes_per_token() == pytest.approx(3 * 2 * sum(range(21, 30)) * 64 / 9)


def test_sampling_is_repeatable_and_follows_the_seed():
    hot = Sampling(temperature=1.5)
    rows = prompts(8, 8)
    assert run(rows, sampling=hot, seed=1).tokens == run(rows, sampling=hot, seed=1).tokens
    assert run(rows, sampling=hot, seed=1).tokens != run(rows, sampling=hot, seed=2).tokens
    nested = run(rows, policy=RECYCLED, sampling=hot, seed=1, loop="nested")
    assert nested.tokens == run(rows, policy=RECYCLED, sampling=hot, seed=1).tokens


@given(st.integers(1, 20), st.floats(0.05, 1.0), st.integers(0, 100))
def test_limits_keep_the_likeliest(top_k, top_p, seed):
    logits = np.random.default_rng(seed).normal(size=(1, 30)).astype(np.float32) * 3
    token, _ = sample(Sampling(1.0, top_k, top_p), jnp.asarray(logits), jax.random.key(seed))
    order = np.argsort(-logits[0])[:top_k]
    probability = np.exp(logits[0][order]) / np.exp(logits[0][order]).sum()
    kept = order[: 1 + int(np.sum(np.cumsum(probability)[:-1] < top_p - 1e-6))]
    # a rounding error at the border may let one more in
    assert int(token[0]) in order[: len(kept) + 1]


def test_bfloat16_decodes():
    model, params = tiny_model(dtype=jnp.bfloat16)
    result = generate(model, params, prompts(9, 30), policy=RECYCLED, max_new_tokens=6, chunk=16)
    wide = run(prompts(9, 30), policy=RECYCLED, max_new_tokens=6)
    # the first token comes from the same prompt: bfloat16 keeps 8 bits, through 3 layers of large weights
    np.testing.assert_allclose([row[0] for row in result.log_probs], [row[0] for row in wide.log_probs], atol=0.3)
    assert np.isfinite(result.log_probs).all()


def test_fed_rows_are_checked():
    with pytest.raises(ValueError, match="fed has 1 rows, expected 2, one for each prompt"):
        run(prompts(11, 4), fed=[[5]])
    with pytest.raises(ValueError, match=r"fed\[1\] is empty, expected at least one token"):
        run(prompts(11, 4), fed=[[5], []])
    with pytest.raises(ValueError, match="fed tokens need loop='cond'"):
        run(prompts(11, 4), policy=RECYCLED, fed=[[5], [6]], loop="nested")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "prompts is empty, expected at least one prompt"),
        ([[1], []], {}, r"prompts\[1\] is empty, expected at least one token"),
        ([[1, 48]], {}, r"prompts\[0\] holds token id 48, expected ids from 0 to 47"),
        ([[1, -2, 3]], {}, r"prompts\[0\] holds token id -2, expected ids from 0 to 47"),
        ([[1] * 30], {"capacity": 32}, "capacity=32 is too small for a prompt of 30 tokens .* 42 slots are needed"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1]], {"loop": "nested"}, "loop='nested' needs a policy with a fixed stride, 'full' has none"),
        ([[1]], {"loop": "bogus"}, "loop='bogus' must be one of cond, nested"),
        ([[1]], {"chunk": 0}, "chunk=0 must be at least 1"),
        ([[1]], {"block": 0}, "block=0 must be at least 1"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_sentence(rows, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user has no annotation checks
    with pytest.raises(ValueError, match=message):
        run(rows, **options)
