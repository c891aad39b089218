"""Examples for the network of `attention-predictor`, and a short run of its training."""

import json

import jax.numpy as jnp
import numpy as np

from recycled_jax.commands.loading import Checkpoint
from recycled_jax.policies.attention_predictor import SHIPPED, attention_predictor, read_weights
from tests.recycled_jax.policies.numpy_llama import Full, NumpyLlama
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model
from train.attention_predictor import (
    ALWAYS,
    CALIBRATION,
    HISTORY,
    Examples,
    Source,
    attention_rows,
    cut,
    held,
    shares,
    train,
)


def test_rows_equal_numpy():
    model, params = tiny_model()
    (tokens,) = prompts(50)
    rows = attention_rows(model, params, jnp.array([tokens], jnp.int32), rows=3)
    llama = NumpyLlama(CONFIG, params, Full())
    for token in tokens:
        llama.forward(token, 0)
    for layer in llama.layers:
        for head in range(CONFIG.query_heads):
            for row, length in enumerate((48, 49, 50)):
                p = np.zeros(64)
                p[:length] = layer.probabilities(layer.q[length - 1][head], head, range(length))
                blocks = p.reshape(4, 16)
                np.testing.assert_allclose(rows.largest[layer.number, head, row], blocks.max(axis=1), atol=1e-5)
                np.testing.assert_allclose(rows.mass[layer.number, head, row], blocks.sum(axis=1), atol=1e-5)


def test_rows_between_exact_ones_are_cut_to_the_selection_of_the_last_exact_one():
    rng = np.random.default_rng(0)
    mass = rng.dirichlet(np.ones(20), size=HISTORY)
    largest = mass / 2
    history, latest = cut(largest, mass, decoded=12, phase=2, keep=3)
    exact = [row for row in range(HISTORY) if HISTORY - row > 12 or (HISTORY - row) % CALIBRATION == 2]
    assert latest == exact[-1]
    for row in range(HISTORY):
        if row in exact:
            np.testing.assert_array_equal(history[row], largest[row])
            continue
        before = max(earlier for earlier in exact if earlier < row)
        middle = np.arange(ALWAYS, 20 - ALWAYS)
        best = middle[np.argsort(-largest[before][middle])[:3]]
        seen = sorted([*range(ALWAYS), *best, *range(20 - ALWAYS, 20)])
        assert np.flatnonzero(history[row]).tolist() == seen
        np.testing.assert_allclose(history[row][seen], largest[row][seen] / mass[row][seen].sum())


def test_what_a_choice_holds():
    mass = np.zeros((1, 2 * ALWAYS + 3))
    mass[0, 0], mass[0, -1], mass[0, ALWAYS : ALWAYS + 3] = 0.2, 0.1, [0.4, 0.1, 0.2]
    scores = np.zeros_like(mass)
    scores[0, ALWAYS : ALWAYS + 3] = [1, 3, 2]
    nothing = np.zeros((1, 0, 0))
    examples = Examples(history=nothing, target=mass, mass=mass, stale=mass)
    np.testing.assert_allclose(held(examples, scores, 2), 0.2 + 0.1 + 0.1 + 0.2)
    np.testing.assert_allclose(held(examples, mass, 2), 0.2 + 0.1 + 0.4 + 0.2)


def test_a_short_run_writes_weights_that_the_policy_takes(tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    train(out, length=512, steps=2, batch=2, held_out=1)
    attention_predictor(predictor="cnn", weights=str(out))
    share = json.loads(capsys.readouterr().out)["share"]
    assert set(share) == {"network", "mean", "average", "stale", "best"}
    assert all(0 < held <= share["best"] <= 1 for held in share.values())


def test_the_shipped_network_holds_more_than_a_stale_selection():
    """Of the embedded model's attention, on texts it was not trained on, exact rows as far apart for both."""
    assert SHIPPED.stat().st_size < 100e3
    checkpoint = Checkpoint.find(None)
    model, params = checkpoint.load("float32")
    weights = {name: jnp.asarray(weight) for name, weight in read_weights(str(SHIPPED)).items()}
    share = shares(Source(model, params, checkpoint.text, length=1024, keep=8, seed=99), weights, 8)
    assert share["stale"] + 0.003 < share["network"] < share["best"]
