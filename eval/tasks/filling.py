"""Filling an example up to its length: it is drafted once, and then grows by units of filler."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from eval.tasks.task import Task
from eval.tasks.word_lists import NOISE
from recycled_jax.tasks.example import Encode, Example

# Makes the example with so many units of filler and so many words of padding.
Build = Callable[[int, int], Example]


@dataclass(frozen=True)
class FilledTask(Task):
    """Tasks whose examples grow by units of filler and, where one unit too few leaves a gap, by single words."""

    @abstractmethod
    def draft(self, *, length: int, seed: int, index: int, encode: Encode) -> Build:
        """Everything random of an example; filler may run out, then more units make no longer prompt."""

    def example(self, *, length: int, seed: int, index: int, encode: Encode) -> Example:
        def tokens(example: Example) -> int:
            return len(encode(example.prompt)) + example.gen_tokens

        def least(length: int) -> int:
            return tokens(self.draft(length=length, seed=seed, index=index, encode=encode)(0, 0))

        build = self.draft(length=length, seed=seed, index=index, encode=encode)
        units, used = fit(lambda n: tokens(build(n, 0)), length, most=length)
        if used > length:
            smallest = _smallest_that_holds(least, length)
            raise ValueError(
                f"length={length} is too short for {self}, the smallest that works here is {smallest} tokens"
            )
        if used >= 0.99 * length:
            return build(units, 0)
        words, _ = fit(lambda n: tokens(build(units, n)), length, most=max(length // 8, 64))
        return build(units, words)


def fit(tokens: Callable[[int], int], limit: int, *, most: int) -> tuple[int, int]:
    """An n up to `most` for which `tokens(n)`, which grows with n, is 99.5 % to 100 % of the limit, and that number; if
    there is none, the largest n below it; 0 if there is not even that.

    Counting the tokens of a long text is what takes time, so n is interpolated: three long counts where bisection needs
    a dozen.
    """
    none = count = used = tokens(0)
    low, high = 0, most + 1 if none <= limit else 1
    guess, rate, counts = 64, 1.0, 0
    while high - low > 1 and used < 0.995 * limit:
        before, counted = guess if counts else 0, count
        if counts:
            # where growth is too uneven to interpolate, halving comes to an end
            guess = guess + math.floor((0.9975 * limit - count) / rate) if counts < 12 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        count = tokens(guess)
        counts += 1
        if count <= limit:
            low, used = guess, count
        else:
            high = guess
        if abs(guess - before) >= 8 or counts == 1:
            rate = max((count - counted) / (guess - before), 1e-6)
    return low, used


def growing[T](source: Iterator[T]) -> Callable[[int], list[T]]:
    """The first n of `source`, or all when it has fewer; each is made when it is needed for the first time."""
    made: list[T] = []

    def first(count: int) -> list[T]:
        made.extend(itertools.islice(source, max(0, count - len(made))))
        return made[:count]

    return first


def _smallest_that_holds(least: Callable[[int], int], length: int) -> int:
    """From `length` upwards, the first length that holds its own smallest example: another one at every length, as the
    length is part of the seed. Their sizes hardly vary by 128 tokens, so gaps above that are jumped over."""
    while (gap := least(length) - length) > 0:
        length += max(1, gap - 128)
    return length


def padding(words: int) -> str:
    """The first so many words of a text that says nothing."""
    return " ".join(itertools.islice(itertools.cycle(NOISE.split()), words))


def joined(parts: Sequence[str], separator: str) -> str:
    """The parts that are not empty."""
    return separator.join(part for part in parts if part)


# What is random about an example of a length: `build(n)` has n units of filler, of which there are `units`.
type Draft = tuple[Callable[[int], Example], int]


def prompt_and_answer(example: Example, encode: Encode) -> int:
    """Tokens of the prompt and of the longest answer."""
    return len(encode(example.prompt)) + example.gen_tokens


def fitted(
    draft: Callable[[int], Draft],
    *,
    length: int,
    encode: Encode,
    task: Task,
    size: Callable[[Example, Encode], int] = prompt_and_answer,
) -> Example:
    """The example of `draft(length)` with as much filler as `fit` finds.

    Raises ValueError when no filler is still too long, naming a length whose own draft was seen to fit; as the drafts
    of two lengths differ, one a few tokens shorter may do too.
    """
    build, units = draft(length)
    count, used = fit(lambda n: size(build(n), encode), length, most=units)
    if used > length:
        smallest = _smallest_that_holds(lambda longer: size(draft(longer)[0](0), encode), length)
        raise ValueError(f"length={length} is too short for {task}, the smallest that works here is {smallest} tokens")
    return build(count)
