"""What a request of lm-evaluation-harness needs of the model: batches generated, or scored in one of two ways."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recycled_jax.decode import Params
from recycled_jax.generate import generate, read
from recycled_jax.lm_eval_plugin.windows import Row, Settings, Stops, Watch, rounded
from recycled_jax.model import Llama, logits
from recycled_jax.policies import Policy
from recycled_jax.sampling import Sampling
from recycled_jax.scoring import score_tokens

_CHUNK = 512  # tokens of a prompt that are read at a time
_PIECE = 128  # tokens whose logits exist at a time when a whole text is scored


class Work(NamedTuple):
    """Decode steps of a batch, summed over rows, and their refreshes, summed over rows and layers."""

    steps: int
    refreshes: int


class Score(NamedTuple):
    """Log-probability (natural) of a row's continuation, and whether greedy decoding would have given it."""

    log_prob: float
    greedy: bool


@dataclass(frozen=True)
class Engine:
    """A model with its parameters and the policy it decodes under."""

    model: Llama
    params: Params
    policy: Policy

    def generate(
        self, prompts: Sequence[list[int]], stops: Sequence[Stops], settings: Settings, *, seed: int
    ) -> tuple[list[str], Work]:
        """Answers to prompts of token ids. Decoding ends when every row has reached a stop."""
        longest = max(map(len, prompts))
        watch = Watch(stops)
        done = generate(
            self.model,
            self.params,
            prompts,
            policy=self.policy,
            max_new_tokens=settings.max_gen_toks,
            sampling=Sampling(settings.temperature, settings.top_k, settings.top_p),
            capacity=rounded(longest + settings.max_gen_toks, _PIECE),
            chunk=_CHUNK,
            seed=seed,
            on_block=watch,
        )
        texts = [row.answer(tokens) for row, tokens in zip(stops, done.tokens, strict=True)]
        return texts, Work(int(done.telemetry.steps.sum()), int(done.telemetry.refreshes().sum()))

    def score_by_decoding(self, rows: Sequence[Row]) -> tuple[list[Score], Work]:
        """Contexts by prefill, continuations through decode steps under the policy, all but their first token.

        A row that is shorter than another goes on over padding, which is not scored. Raises ValueError for a policy
        that corrects the cache.
        """
        counts = np.array([len(row.continuation) for row in rows])
        steps = 1 if counts.max() == 1 else rounded(int(counts.max()), 8)
        tokens = np.zeros((len(rows), steps), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : counts[index]] = row.continuation
        longest = max(len(row.context) for row in rows)
        prefilled = read(
            self.model,
            self.params,
            [row.context for row in rows],
            policies=[self.policy],
            max_new_tokens=steps,
            capacity=rounded(longest + steps, _PIECE),
            chunk=_CHUNK,
        )
        scored = score_tokens(self.model, self.params, prefilled, jnp.asarray(tokens), policy=self.policy)
        log_probs, greedy, refreshed = jax.device_get((scored.log_probs, scored.greedy, scored.trace.refreshed))
        scores = [Score(math.fsum(log_probs[i, :n].tolist()), bool(greedy[i, :n].all())) for i, n in enumerate(counts)]
        refreshes = sum(int(refreshed[: n - 1, :, i].sum()) for i, n in enumerate(counts))
        return scores, Work(int((counts - 1).sum()), refreshes)

    def score_by_prefill(self, rows: Sequence[Row]) -> list[Score]:
        """Context and continuation in one dense pass, whatever the policy."""
        texts = [[*row.context, *row.continuation] for row in rows]
        width = rounded(max(map(len, texts)) - 1, _PIECE)
        tokens, following = np.zeros((2, len(rows), width), np.int32)
        for index, text in enumerate(texts):
            tokens[index, : len(text) - 1], following[index, : len(text) - 1] = text[:-1], text[1:]
        log_probs, greedy = jax.device_get(_judge_texts(self.model, self.params, tokens, following))
        spans = [slice(len(row.context) - 1, len(text) - 1) for row, text in zip(rows, texts, strict=True)]
        return [
            Score(math.fsum(log_probs[index, span].tolist()), bool(greedy[index, span].all()))
            for index, span in enumerate(spans)
        ]


@functools.partial(jax.jit, static_argnames=("model",))
def _judge_texts(
    model: Llama, params: Params, tokens: Int[Array, "batch tokens"], following: Int[Array, "batch tokens"]
) -> tuple[Float[Array, "batch tokens"], Bool[Array, "batch tokens"]]:
    """The log-probability of each following token, and whether it is the most probable one. The logits of all tokens
    are many times the model's activations, so they are made for a piece of the tokens at a time."""

    def judge(weights, config, x):
        def piece(inputs):
            x, following = inputs
            log_probs = jax.nn.log_softmax(logits(weights, config, x))
            chosen = jnp.take_along_axis(log_probs, following[:, :, None], axis=-1)[:, :, 0]
            return chosen, jnp.argmax(log_probs, axis=-1) == following

        pieces = (split(x), split(following))
        log_probs, greedy = lax.map(piece, pieces)
        return log_probs.swapaxes(0, 1).reshape(following.shape), greedy.swapaxes(0, 1).reshape(following.shape)

    def split(values):
        batch, _, *rest = values.shape
        return values.reshape(batch, -1, _PIECE, *rest).swapaxes(0, 1)

    return model.apply(params, tokens, head=judge)  # pyright: ignore[reportReturnType]
