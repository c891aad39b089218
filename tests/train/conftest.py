"""What the trainer's tests share: one tokenizer, and the config of a run that takes seconds."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import train.data
from recycled_jax.tasks.prose import generated_sentences
from train.config import Data, ModelSizes, Optimizer, Stage, TrainConfig
from train.tokenizer import train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def little_prose():
    """The mixture tokenizes 300 generated sentences instead of 20,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data, "generated_sentences", lambda rng, count: generated_sentences(rng, min(count, 300)))
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(generated_sentences(np.random.default_rng(0), 200), merges=Data().tokenizer_merges)


@pytest.fixture
def tiny_run(tmp_path) -> TrainConfig:
    """Two stages, nine steps, a checkpoint after every third, a row of each batch on each device."""
    return TrainConfig(
        out=str(tmp_path / "run"),
        model=ModelSizes(embed=32, mlp=32, layers=2, query_heads=4, kv_heads=2, head_dim=16, max_length=512),
        data=Data(max_position=512),
        optimizer=Optimizer(warmup=2),
        stages=(Stage(length=96, batch=8, steps=4, facts=2), Stage(length=160, batch=8, steps=5, facts=3)),
        save_every=3,
        evaluate_every=6,
        evaluate_examples=1,
        evaluate_length=320,
        log_every=1,
    )
