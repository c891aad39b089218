"""From the text of a question to the tokens that a model reads."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from recycled_jax.commands.loading import Text


@dataclass(frozen=True)
class Prompts:
    """A tokenizer, and whether prompts go into its chat template. `fingerprint` tells it from others.

    Raises ValueError when a chat template is asked for and the tokenizer has none.
    """

    text: Text = field(repr=False, compare=False)
    fingerprint: str
    template: Literal["none", "chat"] = "none"

    def __post_init__(self) -> None:
        if self.template == "chat" and self.text.chat_template is None:
            raise ValueError("template='chat' needs a tokenizer with a chat template, expected template='none'")

    def encode(self, text: str) -> list[int]:
        """The tokens of a whole prompt, with the special ones before it, unless it begins with their text."""
        shown = self._shown(text)
        return self.text.encode_more(shown) if self._begins(shown) else self.text.encode(shown)

    def tokens(self, text: str, answer_prefix: str) -> tuple[int, ...]:
        """Those of a prompt and the beginning of its answer, which stands outside of the template."""
        shown = self._shown(text) + answer_prefix
        return tuple(self.text.encode_more(shown) if self._begins(shown) else self.text.encode(shown))

    def split(self, context: str, question: str, answer_prefix: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens up to the context's end, and those that come after."""
        shown = self._shown(context + question) + answer_prefix
        cut = shown.index(context) + len(context)
        before = self.text.encode_more(shown[:cut]) if self._begins(shown) else self.text.encode(shown[:cut])
        return tuple(before), tuple(self.text.encode_more(shown[cut:]))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens up to the first end-of-sequence id."""
        return self.text.decode(tokens)

    def _shown(self, text: str) -> str:
        return self.text.in_template(text) if self.template == "chat" else text

    def _begins(self, text: str) -> bool:
        bos = self.text.bos
        return bos is not None and text.startswith(bos)


def fingerprint(text: Text) -> str:
    """Of a tokenizer: the first 12 digits of the SHA-256 of its vocabulary and rules."""
    return hashlib.sha256(text.serialized.encode()).hexdigest()[:12]
