"""A shuffled list of keys, each of which has one successor, and a chain to be written from it (RefreshKV, appendix
A.6): which key is needed next depends on the one written last. The wording is ours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from eval.tasks.filling import Draft, fitted
from eval.tasks.task import Task
from recycled_jax.tasks.example import Encode, Example
from recycled_jax.tasks.words import ADJECTIVES, KEYS, PLACES, ROLES, THINGS

TASK = (
    "{where} is a list of keys, one per line. A key is two words joined by a hyphen. Write a chain of {chain} keys "
    "from the list, separated by commas: each key must begin with the word that the key before it ends with. A chain "
    "of three keys that are not in the list: salt-wind, wind-cloud, cloud-leaf."
)
START = " The first key of the chain begins with the word {start}."
PREFIX = "Chain:"

WORDS = (*KEYS, *PLACES, *THINGS, *ADJECTIVES, *ROLES)

_MEASURED = 16  # chains whose tokens are counted to find the longest


@dataclass(frozen=True)
class ChainOfKey(Task):
    """The words form one cycle, each ending one key and beginning the next, longer than the `chain` keys asked for.
    The chain begins anywhere with `start` free, with a word that the question names with given.

    An answer may have 1.3 times the tokens of the longest chain. The score is the share of `chain` before the first
    mistake; with a free start, `gold` is one right answer among many."""

    metric: ClassVar[str] = "chain_of_key"

    chain: int = 10
    start: Literal["free", "given"] = "free"

    def __post_init__(self) -> None:
        if self.chain < 1:
            raise ValueError(f"chain={self.chain} must be at least 1")
        if self.start not in ("free", "given"):
            raise ValueError(f"start={self.start!r} must be 'free' or 'given'")

    def example(self, *, length: int, seed: int, index: int, encode: Encode) -> Example:
        """As `Task.example`; `meta` has all `keys` as listed, the length of the `chain`, and its `start` or None."""

        def draft(length: int) -> Draft:
            rng = self.generator(length=length, seed=seed, index=index)
            least = self.chain + 1
            words = distinct_words(rng, least + max(length, 0))  # a key is one token at least
            in_cycle, in_list = rng.random(len(words)), rng.random(len(words))
            beginning = rng.random()

            def build(more: int) -> Example:
                count = least + more
                cycle = [words[i] for i in np.argsort(in_cycle[:count])]
                keys = [f"{word}-{following}" for word, following in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
                listed = [keys[i] for i in np.argsort(in_list[:count])]
                first = int(beginning * count)
                gold = f" {chain_from(keys, first, self.chain)}"
                start = cycle[first] if self.start == "given" else None
                task = TASK.format(where="Below", chain=self.chain)
                again = TASK.format(where="Above", chain=self.chain) + (START.format(start=start) if start else "")
                context = f"{task}\n\n" + "\n".join(listed)
                longest = max(len(encode(gold)), longest_chain(keys, self.chain, encode))
                gen_tokens = math.ceil(1.3 * longest)
                meta = {"keys": listed, "chain": self.chain, "start": start}
                return Example(index, context, f"\n\n{again}\n", PREFIX, (gold.strip(),), gold, gen_tokens, meta)

            return build, len(words) - least

        return fitted(draft, length=length, encode=encode, task=self)


def chain_from(keys: Sequence[str], first: int, chain: int) -> str:
    """The answer that begins at key `first` of the cycle."""
    return ", ".join(keys[(first + i) % len(keys)] for i in range(chain))


def longest_chain(keys: Sequence[str], chain: int, encode: Encode) -> int:
    """Most tokens of a chain of so many keys. Of those with the most characters: counting all would take seconds."""
    sizes = np.array([len(key) for key in keys])
    ends = np.cumsum(np.concatenate([[0], sizes, sizes[: chain - 1]]))
    most = np.argsort(ends[:-chain] - ends[chain:], kind="stable")[:_MEASURED]
    return max(len(encode(f" {chain_from(keys, int(first), chain)}")) for first in most)


def distinct_words(rng: np.random.Generator, count: int) -> list[str]:
    """`count` words, or all there are if fewer: those of the lists in random order, then compounds of two of them."""
    words = dict.fromkeys(WORDS[i] for i in rng.permutation(len(WORDS)))
    pairs = rng.permutation(len(WORDS) ** 2)[: max(0, count)]
    words |= dict.fromkeys(WORDS[pair // len(WORDS)] + WORDS[pair % len(WORDS)] for pair in pairs)
    return list(words)[:count]
