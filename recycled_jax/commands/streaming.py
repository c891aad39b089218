"""Text on a terminal while it is generated."""

import time
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not UTF-8, or not yet


class Streamer:
    """Prints one row's text as its tokens arrive: `generate`'s `on_block`.

    A token can end within a character, so the whole row is decoded again each time and the part that later tokens
    can no longer change is printed. What was printed, after `finish`, is exactly the decoded row.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], object]):
        self._decode = decode
        self._write = write
        self._tokens: list[int] = []
        self._printed = ""
        self._times: list[tuple[float, int]] = []  # after each block: seconds, tokens so far

    def __call__(self, new_tokens: list[list[int]]) -> None:
        self._tokens += new_tokens[0]
        self._times.append((time.perf_counter(), len(self._tokens)))
        self._print(self._decode(self._tokens).rstrip(REPLACEMENT))

    def finish(self) -> None:
        """Prints what was held back, and ends the line."""
        self._print(self._decode(self._tokens))
        self._write("\n")

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding after prefill and the first block of steps, which may have compiled; None when there was
        nothing after it."""
        if len(self._times) < 3:
            return None
        (start, before), (end, after) = self._times[1], self._times[-1]
        return (after - before) / (end - start)

    def _print(self, text: str) -> None:
        if text.startswith(self._printed):
            self._write(text[len(self._printed) :])
            self._printed = text
