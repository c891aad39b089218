"""Naming what a user probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of a sentence about an unknown `name`: what it may have meant, or what there is."""
    valid = list(valid)
    if not valid:
        return "there is none"
    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(valid)}"
