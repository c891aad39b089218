"""Scores in training are those of decoding: perplexity at each stride, and on any mesh."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from recycled_jax.generate import read
from recycled_jax.mesh import MeshSizes, make_mesh
from recycled_jax.model import Llama
from recycled_jax.policies import make_policy
from recycled_jax.recycled_attention import RecycledAttention
from recycled_jax.scoring import score_tokens
from recycled_jax.tasks.prose import generated_sentences
from tests.train.test_step import CONFIG
from train.config import Evaluation
from train.evaluate import evaluations, perplexity

ONE = jax.make_mesh((1,) * 4, ("data", "fsdp", "tensor", "sequence"), (AxisType.Auto,) * 4, devices=jax.devices()[:1])
ASKED = Evaluation(examples=3, length=64, retrieval=False, scored=12, strides=(4, 6), k=16)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Evaluation:
    path = tmp_path_factory.mktemp("texts") / "novel.txt"
    path.write_text(" ".join(generated_sentences(np.random.default_rng(3), 40)))
    return dataclasses.replace(ASKED, texts=(str(path),))


@pytest.fixture(scope="module")
def model(tokenizer) -> tuple[Llama, dict]:
    """Untrained, with attention sharp enough that what is left out is missed."""
    model = Llama(dataclasses.replace(CONFIG, vocab=len(tokenizer), init_std=0.3))
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def test_perplexities_are_those_of_decoding(model, tokenizer, held_out):
    network, params = model
    found = perplexity(network, tokenizer, ONE, held_out, RecycledAttention())(params)
    text = Path(*held_out.texts).read_text()
    begin = tokenizer("")["input_ids"]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    length = held_out.length - len(begin)
    starts = np.linspace(0, len(tokens) - length, held_out.examples).astype(int)
    pieces = jnp.asarray([[*begin, *tokens[start : start + length]] for start in starts], jnp.int32)
    prompt = held_out.length - held_out.scored
    policies = {"full": make_policy("full")}
    policies |= {f"stride_{stride}": make_policy("recycled", k=16, stride=stride) for stride in held_out.strides}
    assert found.keys() == {f"perplexity_{name}" for name in policies}
    for name, policy in policies.items():
        prompts = pieces[:, :prompt].tolist()
        prefilled = read(network, params, prompts, policies=[policy], max_new_tokens=held_out.scored, chunk=8)
        scored = score_tokens(network, params, prefilled, pieces[:, prompt:], policy=policy)
        assert found[f"perplexity_{name}"] == pytest.approx(math.exp(-float(scored.log_probs.mean())), rel=1e-4)
    assert len(set(found.values())) == 3


def test_any_mesh_gives_the_same_scores(model, tokenizer, held_out):
    network, params = model
    asked = dataclasses.replace(held_out, retrieval=True, length=320, examples=2)
    alone, spread = (
        [score(params) for score in evaluations(network, tokenizer, mesh, asked, seed=0)]
        for mesh in (ONE, make_mesh(MeshSizes(data=2, fsdp=2, sequence=2)))
    )
    assert len(alone) == 2
    for one, eight in zip(alone, spread, strict=True):
        assert one.keys() == eight.keys()
        np.testing.assert_allclose([*eight.values()], [*one.values()], rtol=1e-4)


def test_too_little_text_is_refused(model, tokenizer, held_out):
    with pytest.raises(ValueError, match=r"evaluation.texts have \d+ tokens; expected at least length=9999"):
        perplexity(model[0], tokenizer, ONE, dataclasses.replace(held_out, length=9999), RecycledAttention())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": (5,)}, "evaluation.strides has 5, which must divide scored=12"),
        ({"scored": 72}, "evaluation.scored=72 must be below length=64"),
        ({"texts": ("a.txt",), "k": 5}, "evaluation.strides has 6, which must be at most the selection's k=5"),
        ({"examples": 0}, "evaluation.examples=0 must be at least 1"),
    ],
)
def test_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(ASKED, **change)
