"""The network of the policy `attention-predictor`: `python -m train.attention_predictor --out weights.safetensors`.

It learns on the attention of a model (the embedded one if none is given) to generated questions over generated text,
and to `texts` where there are any: from 64 rows of a head's attention to blocks, the row after them. The rows between
two exact ones are cut down to a selection, as they are while decoding. At the end it prints, as a line of JSON, what
share of the attention a selection of `keep` blocks would have held on fresh examples: by the network, by averages of
the rows, by the last exact row kept as it is (`stale`), and by the true next row.

Source: AttentionPredictor (arXiv 2502.04077), its network; examples, cuts and loss are ours.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int
from jsonargparse import auto_cli
from safetensors.numpy import save_file
from tqdm import tqdm

from pallas_kernels import causal_attention
from recycled_jax import rope
from recycled_jax.commands.loading import Checkpoint, Text
from recycled_jax.decode import Params
from recycled_jax.model import Llama, attention_inputs, attention_output, embed, mlp
from recycled_jax.policies.attention_predictor import WEIGHTS, ExponentialAverage, Weights, predict_rows
from recycled_jax.tasks.prose import generated_sentences, read_haystack
from recycled_jax.tasks.retrieval import TASKS, make_example

BLOCK, HISTORY, CALIBRATION = 16, 64, 5  # the policy's defaults, which are the paper's
ALWAYS = 64 // BLOCK  # blocks at either end that are always read, and that the network does not see
PER_TEXT = 64  # examples taken from a text
TARGETS = 24  # rows of a text, its last ones, that are predicted: they lie in questions and answers


class Rows(NamedTuple):
    """Attention of the last tokens of a text to its blocks: the largest probability in each, and the sum."""

    largest: Float[Array, "layers query_heads rows blocks"]
    mass: Float[Array, "layers query_heads rows blocks"]


class Examples(NamedTuple):
    """What the network sees, and the row to predict: its largest probabilities and the `mass` of its blocks. `stale` is
    the last exact row that was seen."""

    history: Float[np.ndarray, "examples rows blocks"]
    target: Float[np.ndarray, "examples blocks"]
    mass: Float[np.ndarray, "examples blocks"]
    stale: Float[np.ndarray, "examples blocks"]


@dataclass(frozen=True)
class Source:
    """Examples from texts of `length` tokens, of which decoding reads `keep` blocks. Text `index` depends on its number
    and the seed alone."""

    network: Llama
    params: Params
    text: Text
    length: int
    keep: int
    seed: int
    haystack: tuple[str, ...] = ()

    def examples(self, index: int) -> Examples:
        """`PER_TEXT` of text `index`, of random layers, heads and rows."""
        rng = np.random.default_rng([self.seed, index, 1])
        tokens = jnp.asarray(self.tokens(index), jnp.int32)[None]
        found = attention_rows(self.network, self.params, tokens, rows=HISTORY + TARGETS)
        largest, mass = (np.asarray(part).reshape(-1, *part.shape[2:]) for part in found)
        heads = rng.integers(len(largest), size=PER_TEXT)
        at = rng.integers(HISTORY, HISTORY + TARGETS, size=PER_TEXT)
        taken = [self._example(rng, largest[head], mass[head], row) for head, row in zip(heads, at, strict=True)]
        return Examples(*(np.stack(part) for part in zip(*taken, strict=True)))

    def _example(self, rng: np.random.Generator, largest: np.ndarray, mass: np.ndarray, row: int) -> tuple:
        """Up to `row`, with a random number of decode steps since the prompt."""
        before = slice(row - HISTORY, row)
        decoded, phase = int(rng.integers(HISTORY)), int(rng.integers(CALIBRATION))
        history, latest = cut(largest[before], mass[before], decoded=decoded, phase=phase, keep=self.keep)
        return history, largest[row], mass[row], largest[before][latest]

    def tokens(self, index: int) -> list[int]:
        """A question with its answer, behind a text that hides it; where there is a haystack, every other time a piece
        of that and nothing else."""
        rng = np.random.default_rng([self.seed, index])
        if self.haystack and index % 2:
            start = int(rng.integers(len(self.haystack)))
            piece = " ".join([*self.haystack[start : start + self.length], *self.haystack[: self.length]])
            return self.text.encode(piece)[: self.length]
        task = TASKS[str(rng.choice(list(TASKS)))]
        example = make_example(task, length=self.length, seed=self.seed, index=index, encode=self.text.encode)
        tokens = self.text.encode(example.prompt + example.gold)
        # all texts have one length: what this one lacks stands in front of it
        filler = self.text.encode(" ".join(generated_sentences(rng, self.length // 6)))
        return [tokens[0], *filler[1 : 1 + self.length - len(tokens)], *tokens[1:]]


def cut(
    largest: Float[np.ndarray, "rows blocks"],
    mass: Float[np.ndarray, "rows blocks"],
    *,
    decoded: int,
    phase: int,
    keep: int,
) -> tuple[Float[np.ndarray, "rows blocks"], int]:
    """A history as decoding has it, and its last exact row.

    The last `decoded` rows are those of decode steps. Of these, the ones whose age leaves the remainder `phase` are
    exact; the others are what attention to a selection would have found, one by the last exact row before.
    """
    rows, blocks = largest.shape
    age = np.arange(rows, 0, -1)
    exact = (age > decoded) | (age % CALIBRATION == phase)
    latest = np.maximum.accumulate(np.where(exact, np.arange(rows), 0))
    middle = (np.arange(blocks) >= ALWAYS) & (np.arange(blocks) < blocks - ALWAYS)
    scores = np.where(middle[None, :], largest[latest], -1.0)
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    held = (rank < keep) | ~middle[None, :]
    share = np.sum(mass, axis=1, where=held, keepdims=True)
    return np.where(exact[:, None], largest, np.where(held, largest / share, 0.0)), int(latest[-1])


@functools.partial(jax.jit, static_argnames=("network", "rows"))
def attention_rows(network: Llama, params: Params, tokens: Int[Array, "1 tokens"], *, rows: int) -> Rows:
    """Of the last `rows` tokens, in dense attention."""
    config, weights = network.config, params["params"]
    length = tokens.shape[1]
    angles = rope.angles(config, jnp.arange(length, dtype=jnp.int32)[None])
    seen = jnp.arange(length)[None, :] <= jnp.arange(length - rows, length)[:, None]

    def layer(x, w):
        q, k, v = attention_inputs(w, config, x)
        q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
        keys = jnp.repeat(k[0], config.group, axis=0).astype(jnp.float32)
        logits = config.head_dim**-0.5 * jnp.einsum("hrd,htd->hrt", q[0, :, -rows:].astype(jnp.float32), keys)
        p = jax.nn.softmax(jnp.where(seen[None], logits, -jnp.inf), axis=-1)
        p = jnp.pad(p, ((0, 0), (0, 0), (0, -length % BLOCK))).reshape(*p.shape[:2], -1, BLOCK)
        x = x + attention_output(w, causal_attention(q, k, v))
        return x + mlp(w, config, x), Rows(jnp.max(p, axis=-1), jnp.sum(p, axis=-1))

    return lax.scan(layer, embed(weights, tokens, network.dtype), weights["layers"])[1]


def initial(seed: int) -> Weights:
    """The first channel of both convolutions hands the rows on, so training begins at an average of the rows; the other
    channels are small and random."""
    rng = np.random.default_rng(seed)
    weights = {name: np.zeros(shape, np.float32) for name, shape in WEIGHTS.items()}
    for name in ("conv1", "conv2"):
        shape = WEIGHTS[name]
        weights[name] += 0.3 * np.sqrt(2 / np.prod(shape[:-1])) * rng.normal(size=shape)
        weights[name][..., 0] = 0
        weights[name][1, 1, 0, 0] = 1
    weights["out"] += 0.05 * np.sqrt(1 / WEIGHTS["out"][0]) * rng.normal(size=WEIGHTS["out"])
    weights["out"][0] = 1
    weights["decay"] += 0.9
    return {name: jnp.asarray(weight) for name, weight in weights.items()}


def loss(weights: Weights, history: Float[Array, "examples rows blocks"], target: Float[Array, "examples blocks"]):
    """Squared error relative to the target; heads whose attention is all at the ends count little."""
    middle = _middle(history.shape[-1])
    scale = jnp.max(jnp.where(middle, history, 0.0), axis=(1, 2))[:, None] + 1e-9
    error = jnp.where(middle[0], predict_rows(weights, history, middle[0]) - target, 0.0) / scale
    size = jnp.where(middle[0], target, 0.0) / scale
    return jnp.mean(jnp.sum(error**2, axis=1) / (jnp.sum(size**2, axis=1) + 1.0))


def _middle(blocks: int):
    numbers = jnp.arange(blocks)
    return ((numbers >= ALWAYS) & (numbers < blocks - ALWAYS))[None, None, :]


def held(examples: Examples, scores: Float[np.ndarray, "examples blocks"], keep: int) -> float:
    """Mean share of the attention in the `keep` best blocks between the ends, and in the ends."""
    middle = slice(ALWAYS, -ALWAYS)
    chosen = np.argsort(-scores[:, middle], axis=1, kind="stable")[:, :keep]
    between = np.take_along_axis(examples.mass[:, middle], chosen, axis=1).sum(axis=1)
    return float(np.mean(examples.mass.sum(axis=1) - examples.mass[:, middle].sum(axis=1) + between))


def train(
    out: Path,
    texts: list[str] = [],  # noqa: B006  (a default for the command line, never changed)
    held_out_texts: list[str] = [],  # noqa: B006
    model: str | None = None,
    length: int = 1024,
    keep: int = 8,
    steps: int = 200,
    batch: int = 32,
    learning_rate: float = 1e-3,
    held_out: int = 32,
    seed: int = 0,
) -> None:
    """Args: `texts` are files; `held_out_texts`, too, for the figures; `length` in tokens; `held_out` is the number of
    texts that the figures are of; the others as in the module's text."""
    checkpoint = Checkpoint.find(model)
    network, params = checkpoint.load("float32")
    haystack, unseen = (
        tuple(sentence for path in paths for sentence in read_haystack(path, argument=argument))
        for paths, argument in ((texts, "texts"), (held_out_texts, "held_out_texts"))
    )
    source = Source(network, params, checkpoint.text, length, keep, seed, haystack)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    weights = initial(seed)
    state = optimizer.init(weights)

    @jax.jit
    def step(weights, state, history, target):
        value, gradient = jax.value_and_grad(loss)(weights, history, target)
        updates, state = optimizer.update(gradient, state)
        moved = cast(dict[str, jax.Array], optax.apply_updates(weights, updates))
        return moved | {"decay": jnp.clip(moved["decay"], 0.01, 1.0)}, state, value

    rng = np.random.default_rng([seed, 2])
    pool, texts_read = [], 0
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for _ in range(steps):
            # twice as many texts as their examples would last, and never more than 32 to draw from
            while texts_read * PER_TEXT < 2 * (bar.n + 1) * batch:
                pool = [*pool[-31:], source.examples(texts_read)]
                texts_read += 1
            of_text, place = rng.integers(len(pool), size=batch), rng.integers(PER_TEXT, size=batch)
            history, target = (
                np.stack([getattr(pool[text], name)[i] for text, i in zip(of_text, place, strict=True)])
                for name in ("history", "target")
            )
            weights, state, value = step(weights, state, jnp.asarray(history), jnp.asarray(target))
            bar.update()
            bar.set_postfix(loss=f"{float(value):.4f}")
    save_file({name: np.asarray(weight) for name, weight in weights.items()}, out)
    fresh = Source(network, params, checkpoint.text, length, keep, seed + 1, unseen)
    print(json.dumps({"keep": keep, "length": length, "share": shares(fresh, weights, held_out)}))


def shares(source: Source, weights: Weights, texts: int) -> dict[str, float]:
    """The attention held by each way to choose blocks."""
    parts = [source.examples(index) for index in range(texts)]
    examples = Examples(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    history = jnp.asarray(examples.history)
    visible = _middle(history.shape[-1])[0]
    scores = {
        "network": predict_rows(weights, history, visible),
        "mean": ExponentialAverage(1.0).predict(history[:, None], visible)[:, 0],
        "average": ExponentialAverage(0.9).predict(history[:, None], visible)[:, 0],
        "stale": examples.stale,
        "best": examples.target,
    }
    return {name: held(examples, np.asarray(score), source.keep) for name, score in scores.items()}


if __name__ == "__main__":
    auto_cli(train, as_positional=False)
