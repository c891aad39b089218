"""Training sequences of the retrieval mixture: filler with hidden facts, then questions about them.

The batch of a step depends on the config, the seed and the step only, so a resumed run sees exactly the sequences an
uninterrupted one would have seen.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from recycled_jax.tasks.prose import generated_sentences
from recycled_jax.tasks.retrieval import Fact, hide, number_fact, path_facts, random_value
from recycled_jax.tasks.words import KEYS
from train.config import Data, Stage
from train.tokenizer import BOS, EOS


class Batch(NamedTuple):
    """`weights[b, t]` is the loss weight of predicting `tokens[b, t]`; `answers` marks the tokens of answers."""

    tokens: np.ndarray  # int32 [batch, tokens]
    positions: np.ndarray  # int32 [batch, tokens], increasing, with skips
    weights: np.ndarray  # float32 [batch, tokens]
    answers: np.ndarray  # bool [batch, tokens]


class RetrievalMixture:
    """Batches for any step; holds the tokenized filler."""

    def __init__(self, config: Data, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str], seed: int):
        self.config = config
        self.seed = seed
        vocabulary = tokenizer.get_vocab()
        self.bos, self.eos = vocabulary[BOS], vocabulary[EOS]
        self._tokenizer = tokenizer
        self._texts = self._encode([f" {sentence}" for sentence in sentences])
        prose = generated_sentences(np.random.default_rng([seed, 1]), 20_000)
        self._prose = self._encode([f" {sentence}" for sentence in prose])

    @property
    def positions(self) -> dict:
        """Nothing: batches follow from their step."""
        return {}

    def batch(self, step: int, stage: Stage) -> Batch:
        rng = np.random.default_rng([self.seed, 2, step])
        rows = [self._row(rng, stage) for _ in range(stage.batch)]
        return Batch(*(np.stack(field) for field in zip(*rows, strict=True)))

    def _row(self, rng: np.random.Generator, stage: Stage) -> Batch:
        hidden, asked = self._facts(rng, int(rng.integers(1, stage.facts + 1)))
        hidden_ids = self._encode([f" {sentence}" for sentence in hidden])
        prompts = self._encode([fact.exchange for fact in asked])
        answers = self._encode([fact.answer for fact in asked])
        # one fact at least, then as many questions as leave room for a little filler
        room = stage.length - 1 - sum(map(len, hidden_ids)) - 24
        exchanges: list[tuple[list[int], list[int]]] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            room -= len(prompt) + len(answer) + 1
            if room < 0 and exchanges:
                break
            exchanges.append((prompt, [*answer, self.eos]))
        used = 1 + sum(map(len, hidden_ids)) + sum(len(p) + len(a) for p, a in exchanges)
        context = self._context(rng, hidden_ids, stage.length - used)
        tokens, answer_mask, weights = [self.bos], [False], [0.0]
        for ids, is_fact in context:
            tokens += ids
            answer_mask += [False] * len(ids)
            # the values of facts are random: predicting them teaches nothing
            weights += [0.0 if is_fact else stage.text_weight] * len(ids)
        for prompt, answer in exchanges:
            tokens += [*prompt, *answer]
            answer_mask += [False] * len(prompt) + [True] * len(answer)
            weights += [0.0] * len(prompt) + [1.0] * len(answer)
        cut = slice(0, stage.length)
        return Batch(
            np.asarray(tokens[cut], np.int32),
            self._positions(rng, stage),
            np.asarray(weights[cut], np.float32),
            np.asarray(answer_mask[cut]),
        )

    def _facts(self, rng: np.random.Generator, count: int) -> tuple[list[str], list[Fact]]:
        names = [KEYS[i] for i in rng.permutation(len(KEYS))]
        if rng.random() < self.config.chain_share:
            hops = min(max(count, 2), 8)
            sentences, asked = path_facts(names[: hops + 1])
            starts = [path_facts(names[i : hops + 1])[1] for i in rng.permutation(hops)[:2]]
            return sentences, [asked, *starts]
        low, high = self.config.digits
        facts = [number_fact(name, random_value(rng, int(rng.integers(low, high + 1)))) for name in names[:count]]
        return [fact.sentence for fact in facts], [facts[i] for i in rng.permutation(count)]

    def _context(self, rng: np.random.Generator, hidden: list[list[int]], room: int) -> list[tuple[list[int], bool]]:
        """Filler of exactly `room` tokens (the last sentence cut), the facts at random sentence boundaries in it."""
        source = self._texts if self._texts and rng.random() < self.config.text_share else self._prose
        filler: list[list[int]] = []
        at = rng.integers(len(source))
        while room > 0:
            sentence = source[at % len(source)][:room]
            filler.append(sentence)
            room -= len(sentence)
            at += 1
        depths = rng.random(len(hidden)).tolist()
        facts = {id(ids) for ids in hidden}
        return [(ids, id(ids) in facts) for ids in hide(hidden, depths, filler)]

    def _positions(self, rng: np.random.Generator, stage: Stage) -> np.ndarray:
        """Positions with a few random skips (PoSE, Zhu et al. 2023, arXiv 2309.10400): short sequences that show the
        model the rotary distances of long ones."""
        length = stage.length
        positions = np.arange(length)
        if rng.random() < stage.skip_share and length < self.config.max_position:
            skips = rng.integers(1, 6)
            total = rng.integers(self.config.max_position - length)
            shares = np.floor(rng.dirichlet(np.ones(skips)) * total).astype(int)
            for at, share in zip(rng.integers(1, length, size=skips), shares, strict=True):
                positions[at:] += share
        return positions.astype(np.int32)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
