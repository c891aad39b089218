"""The model a command works with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from recycled_jax.config import LlamaConfig
from recycled_jax.decode import Params
from recycled_jax.hf import find_checkpoint
from recycled_jax.model import Llama

EMBEDDED = Path(__file__).parents[1] / "embedded"


class Text:
    """Text to tokens and back, as the model in a folder sees it."""

    def __init__(self, folder: Path, config: LlamaConfig):
        from recycled_jax.tokenizer import load_tokenizer  # transformers takes seconds, `--help` should not

        self._tokenizer = load_tokenizer(folder)
        self._eos_ids = config.eos_ids

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with the special ones that belong before it."""
        return self._tokenizer(text, verbose=False)["input_ids"]

    def encode_more(self, text: str) -> list[int]:
        """The tokens of text that goes on, without special ones."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens up to the first end-of-sequence id, without special ones."""
        kept = list(takewhile(lambda token: token not in self._eos_ids, tokens))
        return str(self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder with all that is needed to check prompts; the weights come with `load`."""

    folder: Path
    config: LlamaConfig
    text: Text

    @classmethod
    def find(cls, model: str | None) -> "Checkpoint":
        """The checkpoint in a folder, or of a name in the local Hugging Face cache; None is the embedded model.

        Raises FileNotFoundError and ValueError as `hf.find_checkpoint`, `LlamaConfig.from_hf` and `load_tokenizer` do.
        """
        folder = EMBEDDED if model is None else find_checkpoint(model)
        config = LlamaConfig.from_hf(folder)
        return cls(folder, config, Text(folder, config))

    def load(self, dtype: str) -> tuple[Llama, Params]:
        """Model and parameters, computing in `dtype`. Raises as `checkpoint.load_model`."""
        from recycled_jax.checkpoint import load_model  # orbax takes seconds

        return load_model(self.folder, dtype=dtype)
