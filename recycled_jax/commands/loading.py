"""The model a command works with."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from recycled_jax.config import LlamaConfig
from recycled_jax.decode import Params
from recycled_jax.hf import find_checkpoint
from recycled_jax.model import Llama

EMBEDDED = Path(__file__).parents[1] / "embedded"
_PIECES, _PIECE = 64, 1 << 16  # what a fingerprint reads of a file


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

    @property
    def bos(self) -> str | None:
        """The text of the token that begins a prompt."""
        return self._tokenizer.bos_token  # pyright: ignore[reportReturnType]

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own."""
        return self._tokenizer.chat_template  # pyright: ignore[reportReturnType]

    def in_template(self, text: str) -> str:
        """The chat template around what a user says, up to where the answer begins."""
        said = [{"role": "user", "content": text}]
        # some templates tell the date, and the prompts of a run must not change from one day to the next
        date: dict[str, Any] = {"date_string": "1 January 2026"}
        return str(self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **date))

    @property
    def serialized(self) -> str:
        """Vocabulary, rules and template: two tokenizers with the same one give the same tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else str(sorted(self._tokenizer.get_vocab().items()))
        return rules + str(self.chat_template)

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

    @property
    def fingerprint(self) -> str:
        """12 digits that tell its config and weights from others': by the names and sizes of their files, and by 64
        evenly spaced pieces of each, as weights of many gigabytes need not be read twice."""
        digest = hashlib.sha256()
        for path in (self.folder / "config.json", *sorted(self.folder.rglob("*"))):
            within = path.relative_to(self.folder)
            orbax = len(within.parts) > 1 and not any(part.startswith(".") for part in within.parts)
            if not path.is_file() or not (path.suffix == ".safetensors" or within.name == "config.json" or orbax):
                continue
            size = path.stat().st_size
            digest.update(f"{within} {size}\n".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(size // _PIECES, _PIECE)):
                    file.seek(start)
                    digest.update(file.read(_PIECE))
        return digest.hexdigest()[:12]

    def load(self, dtype: str, mesh: Mesh | None = None) -> tuple[Llama, Params]:
        """Model and parameters, computing in `dtype`, on a mesh if there is one. Raises as `checkpoint.load_model`."""
        from recycled_jax.checkpoint import load_model  # orbax takes seconds

        model, params = load_model(self.folder, dtype=dtype, mesh=mesh)
        return model.clone(mesh=mesh), params
