"""One context, several questions after one another, after microsoft/MInference's scbench: what a policy has dropped for
the first question is missing for the next. A context whose every line is a key and its number; the wording is ours."""

from dataclasses import dataclass
from typing import Any, ClassVar

from eval.tasks.filling import Draft, fitted
from eval.tasks.sentences import Filler
from eval.tasks.task import Task
from eval.tasks.word_lists import check_digits, distinct_numbers
from recycled_jax.tasks.example import Encode, Example
from recycled_jax.tasks.prose import filler_sentences
from recycled_jax.tasks.words import KEYS

FACT = "The magic number for {key} is {value}."
QUESTION = "\nWhat is the magic number for {key}? "
PREFIX = "The magic number for {key} is "
GOLD = "{value}."
GEN_TOKENS = 16

_WORDS_PER_LINE = 7  # units of filler: fewer words of prose, on a line of their own, are what one more line replaces


@dataclass(frozen=True)
class MultiTurn(Task):
    """`turns` questions, each after another key of the same context, then with `control` that of turn 1 once more.

    The example is its first turn; `meta["turns"]` has all of them with their own question, answer prefix, outputs and
    gold, the control marked. The text of turn n is the context and the exchanges of the turns up to it, one after
    another. `length` holds that of the last with answers of `gen_tokens` in every turn; a chat template is counted
    once. Numbers have `digits` digits, keys `key_words` words: of one word there are as few as `words.KEYS`, and lines
    of prose fill what is left of a long text.
    """

    metric: ClassVar[str] = "all"

    turns: int = 2
    control: bool = True
    digits: int = 7
    key_words: int = 2

    @property
    def questions(self) -> int:
        return self.turns + self.control

    def __post_init__(self) -> None:
        if not 2 <= self.turns <= 5:
            raise ValueError(f"turns={self.turns} must be between 2 and 5")
        if self.key_words not in (1, 2):
            raise ValueError(f"key_words={self.key_words} must be 1 or 2")
        check_digits(self.digits, count=self.turns)

    def example(self, *, length: int, seed: int, index: int, encode: Encode) -> Example:
        """As `Task.example`, of turn 1."""

        def draft(length: int) -> Draft:
            rng = self.generator(length=length, seed=seed, index=index)
            most = min(len(KEYS) ** self.key_words, 9 * 10 ** (self.digits - 1) // 2)
            count = min(most, self.turns + max(length, 0) // 5)  # a line has 7 words, no tokenizer has fewer tokens
            numbers = rng.choice(len(KEYS) ** self.key_words, size=count, replace=False)
            keys = [_key(int(number), self.key_words) for number in numbers]
            values = distinct_numbers(rng, count, self.digits)
            places = rng.random(count).tolist()
            prose = Filler(filler_sentences(rng, length if count == most else _WORDS_PER_LINE))
            prose_places = rng.random(len(prose.sentences)).tolist()
            turns = [_turn(key, value) for key, value in zip(keys[: self.turns], values, strict=False)]
            if self.control:
                turns.append({**turns[0], "control": True})

            def build(units: int) -> Example:
                lines = min(units // _WORDS_PER_LINE, count - self.turns)
                facts = zip(places, keys[: self.turns + lines], values, strict=False)
                placed = [(place, FACT.format(key=key, value=value)) for place, key, value in facts]
                placed += zip(prose_places, prose.first(units - lines * _WORDS_PER_LINE), strict=False)
                text = "\n".join(line for _, line in sorted(placed))
                now = turns[0]
                question, prefix, gold = now["question"], now["answer_prefix"], now["gold"]
                outputs = tuple(now["outputs"])
                return Example(index, text, question, prefix, outputs, gold, GEN_TOKENS, {"turns": turns})

            return build, _WORDS_PER_LINE * (count - self.turns) + prose.words

        return fitted(draft, length=length, encode=encode, task=self, size=all_turns)


def all_turns(example: Example, encode: Encode) -> int:
    """Tokens of the context, all questions and answers as long as they may be."""
    turns = example.meta["turns"]
    asked = "".join(turn["question"] + turn["answer_prefix"] for turn in turns)
    answers = (max(example.gen_tokens, len(encode(turn["gold"]))) for turn in turns)
    return len(encode(example.context + asked)) + sum(answers)


def _key(number: int, words: int) -> str:
    return "-".join(KEYS[number // len(KEYS) ** i % len(KEYS)] for i in range(words))


def _turn(key: str, value: str) -> dict[str, Any]:
    question, prefix, gold = (template.format(key=key, value=value) for template in (QUESTION, PREFIX, GOLD))
    return {"question": question, "answer_prefix": prefix, "outputs": [value], "gold": gold}
