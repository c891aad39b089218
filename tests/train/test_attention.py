"""Training with another attention in place of the causal one: CCA-Attention, and recycled attention."""

import dataclasses

import jax
import numpy as np
import pytest

import train.loop
from recycled_jax.cca import CCA
from recycled_jax.hf import save_hf
from recycled_jax.mesh import MeshSizes, make_mesh
from recycled_jax.model import Llama
from recycled_jax.orbax_io import save_orbax
from recycled_jax.recycled_attention import RecycledAttention
from recycled_jax.tokenizer import load_tokenizer
from tests.train import tiny_run
from tests.train.test_step import ADAMW, CONFIG, STEPS, batch
from train.__main__ import parse
from train.config import Evaluation, ModelSizes, Stage, TrainConfig
from train.optimizer import make_optimizer
from train.step import init_state, loss_sums, make_train_step


@pytest.mark.parametrize("attention", [CCA(group=4, window=6), RecycledAttention(6, 3, 4)], ids=["cca", "recycled"])
def test_it_learns_on_eight_devices_from_the_loss_that_one_computes(attention):
    model, mesh = Llama(CONFIG, attention=attention), make_mesh(MeshSizes(data=2, fsdp=2, tensor=2))
    optimizer, again = make_optimizer(ADAMW, CONFIG, STEPS), batch()
    state, step = init_state(model, optimizer, mesh, seed=0), make_train_step(model, optimizer, mesh)
    one_computes = jax.jit(loss_sums, static_argnums=0)(model, jax.device_get(state.params), again)
    history = []
    for _ in range(4):
        state, metrics = step(state, again)
        history.append(float(metrics.loss))
    assert history[0] == pytest.approx(float(one_computes.loss / one_computes.weight), rel=1e-5)
    assert history[-1] < 0.99 * history[0]


@pytest.fixture
def first_step(monkeypatch):
    """Begins a run, and gives its model and the state that its first step is given."""

    def begin(config: TrainConfig):
        found = []

        def make(model, *rest, **knobs):
            def step(state, batch):
                found.extend((model, jax.device_get(state)))
                raise KeyboardInterrupt

            return step

        monkeypatch.setattr(train.loop, "make_train_step", make)
        with pytest.raises(KeyboardInterrupt):
            train.loop.train(config)
        return found

    return begin


@pytest.mark.parametrize(
    ("told", "attention", "save"),
    [
        ("cca: {group: 4, window: 12}", CCA(group=4, window=12), save_hf),
        ("recycled: {k: 16, stride: 5, chunks: 2, anchor: own}", RecycledAttention(16, 5, 2, anchor="own"), save_orbax),
    ],
    ids=["cca, Hugging Face", "recycled, orbax"],
)
def test_a_run_tunes_a_checkpoint_as_its_config_says(told, attention, save, tmp_path, tokenizer, first_step):
    ids = tokenizer.get_vocab()
    sizes = dataclasses.replace(CONFIG, vocab=len(ids), tie_embeddings=True, eos_ids=(ids["</s>"],), init_std=0.1)
    params = jax.jit(Llama(sizes).init)(jax.random.key(5), np.zeros((1, 1), np.int32))
    save(tmp_path / "start", Llama(sizes), params)
    tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "run.yaml").write_text(f"model: {{start: {tmp_path / 'start'}, {told}}}\n")
    asked = parse(["--config", str(tmp_path / "run.yaml")]).model
    unmeasured = Evaluation(retrieval=False)
    model, state = first_step(dataclasses.replace(tiny_run.config(tmp_path), model=asked, evaluation=unmeasured))
    assert model.attention == attention
    assert (model.config.layers, model.config.vocab) == (sizes.layers, sizes.vocab)
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params, params))
    assert int(state.step) == 0
    ours, theirs = (load_tokenizer(tmp_path / folder)("apple is 12") for folder in ("run/tokenizer", "start"))
    assert ours["input_ids"] == theirs["input_ids"]


def test_a_checkpoint_tells_the_sizes():
    with pytest.raises(ValueError, match="layers=2 is told by the checkpoint model"):
        ModelSizes(start="there", layers=2)


def test_a_model_attends_in_one_way_only():
    with pytest.raises(ValueError, match=r"model.cca and model.recycled are both given"):
        ModelSizes(cca=CCA(), recycled=RecycledAttention())


def test_sequences_have_room_for_the_chunks():
    with pytest.raises(ValueError, match=r"stages: length=40 with model.recycled: .* no prefix before chunks=4"):
        TrainConfig(
            model=ModelSizes(recycled=RecycledAttention(16, 10, 4)), stages=(Stage(length=40, batch=1, steps=1),)
        )
