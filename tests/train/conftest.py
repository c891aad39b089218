"""What the trainer's tests share: one tokenizer, and less text than a real run reads."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from transformers import PreTrainedTokenizerFast

from recycled_jax.tasks.prose import generated_sentences
from tests.train.tiny_run import little_text
from train.config import Data
from train.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(generated_sentences(np.random.default_rng(0), 200), merges=Data().tokenizer_merges)


@pytest.fixture(scope="session", autouse=True)
def _little_text(tokenizer):
    with little_text(tokenizer):
        yield


@pytest.fixture(scope="package", autouse=True)
def _compiled_once(tmp_path_factory):
    """The same program in another run, or in another process, is not compiled again."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # jax has decided at its first compilation whether there is a cache
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
