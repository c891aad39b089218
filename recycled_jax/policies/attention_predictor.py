"""AttentionPredictor: the next step's attention to blocks, extrapolated from the rows before it."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from safetensors.numpy import load_file

from pallas_kernels import KVCache, token_scores
from recycled_jax.frame import Attended, Axes, Here, LastQueries, LayerPlan, Method
from recycled_jax.frame.method import in_words, layers_in_words, selecting_trace
from recycled_jax.policies.infllm import Blocks, attend_and_weigh
from recycled_jax.policies.policy import Policy

# The network: two convolutions over rows and blocks, an average over the rows, a weighted sum of the channels. The
# paper's has 4,833 numbers; one more is ours: in the average, a row counts `decay` times as much as the one after it
# (1, where a file does not tell it, is the paper's). Convolutions cannot know which row is the newest.
WEIGHTS = {
    "conv1": (3, 3, 1, 16),
    "bias1": (16,),
    "conv2": (3, 3, 16, 32),
    "bias2": (32,),
    "out": (32,),
    "out_bias": (),
    "decay": (),
}
SHIPPED = Path(__file__).with_suffix(".safetensors")  # trained on the embedded model
Weights = Mapping[str, Array]
Prediction = Literal["cnn", "average"]


class Predictor(ABC):
    """What comes after a history of attention to blocks. Implementations are frozen dataclasses."""

    @abstractmethod
    def predict(
        self, history: Float[Array, "batch heads rows blocks"], visible: Bool[Array, "batch blocks"]
    ) -> Float[Array, "batch heads blocks"]:
        """Scores of the blocks that are `visible`, from their columns alone; the newest row stands last."""


@dataclass(frozen=True)
class ExponentialAverage(Predictor):
    """A row counts `decay` times as much as the one after it; with 1, all count alike."""

    decay: float

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def predict(self, history, visible):
        return jnp.einsum("r,bhrp->bhp", row_weights(self.decay, history.shape[2]), history)


def check_decay(decay: float) -> None:
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} must be above 0 and at most 1 (all rows count alike)")


def row_weights(decay: float | Float[Array, ""], rows: int) -> Float[Array, " rows"]:
    """Of an average over `rows`, the newest last."""
    weights = decay ** jnp.arange(rows - 1, -1, -1, dtype=jnp.float32)
    return weights / jnp.sum(weights)


@dataclass(frozen=True)
class Network(Predictor):
    """The paper's small CNN, one for all layers and heads, from a safetensors file with the arrays of `WEIGHTS`.

    Raises FileNotFoundError where there is no such file, ValueError where it holds something else.
    """

    path: str

    def __post_init__(self) -> None:
        read_weights(self.path)

    def predict(self, history, visible):
        weights = {name: jnp.asarray(weight) for name, weight in read_weights(self.path).items()}
        batch, heads, rows, blocks = history.shape
        flat = history.reshape(batch * heads, rows, blocks)
        return predict_rows(weights, flat, jnp.repeat(visible, heads, axis=0)).reshape(batch, heads, blocks)


def predict_rows(
    weights: Weights, histories: Float[Array, "histories rows blocks"], visible: Bool[Array, "#histories blocks"]
) -> Float[Array, "histories blocks"]:
    """The network itself. Histories end where they are not visible, with zeros beyond for every convolution. It sees
    them relative to their largest value (ours): probabilities differ by orders of magnitude between heads."""
    shown = visible[:, None, :, None]
    hidden = jnp.where(shown, histories[..., None], 0.0)
    scale = jnp.max(hidden, axis=(1, 2, 3), keepdims=True)
    hidden = hidden / jnp.where(scale > 0, scale, 1.0)
    for kernel, bias in (("conv1", "bias1"), ("conv2", "bias2")):
        hidden = lax.conv_general_dilated(
            hidden,
            weights[kernel],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        hidden = jnp.where(shown, jax.nn.relu(hidden + weights[bias][None, None, None, :]), 0.0)
    average = jnp.einsum("r,nrbc->nbc", row_weights(weights["decay"], histories.shape[1]), hidden)
    return (jnp.einsum("nbc,c->nb", average, weights["out"]) + weights["out_bias"]) * scale[:, 0, 0]


@functools.cache
def read_weights(path: str) -> dict[str, np.ndarray]:
    """The network's weights, float32."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights={path!r} is not there; python -m train.attention_predictor makes such a file")
    weights = load_file(path)
    shapes = {name: weight.shape for name, weight in weights.items()}
    if {"decay": (), **shapes} != WEIGHTS:
        raise ValueError(f"weights={path!r} holds {shapes}, expected {WEIGHTS}")
    weights = {"decay": np.ones(()), **weights}
    check_decay(float(weights["decay"]))
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


@dataclass(frozen=True)
class AttentionPredictor(Method):
    """Every step reads the blocks that the predictor scores highest, with sinks and recent window. The probabilities it
    finds are the newest row of the history, but every `calibration` steps the exact ones are; what is attended does not
    depend on them."""

    blocks: Blocks
    predictor: Predictor
    history: int
    calibration: int
    layers: LayerPlan

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history={self.history} must be at least 1 row")
        if self.calibration < 1:
            raise ValueError(f"calibration={self.calibration} must be at least 1 (1 calibrates at every step)")

    @property
    def axes(self):
        when = f"every-step, exact row every {self.calibration}" + layers_in_words(self.layers)
        return Axes(f"{in_words(self.predictor)} of {self.history} rows", in_words(self.blocks), when)

    @property
    def observers(self):
        return (LastQueries(self.history),)

    @property
    def plan(self):
        return self.layers

    def begin(self, prefilled, *, implementation) -> Float[Array, "layers batch query_heads rows blocks"]:
        """The rows of the last prompt tokens; zeros before the first token."""
        cache, lengths = prefilled.cache, prefilled.prompts.lengths
        q = prefilled.prompts.seen(LastQueries(self.history)).q

        def row(layer, index):
            seen = jnp.maximum(lengths - (self.history - 1 - index), 0)  # a row of nothing is a row of zeros
            return self._exact(q[layer, :, :, index], cache, seen, layer=layer, implementation=implementation)

        def of_layer(layer):
            return jnp.moveaxis(lax.map(lambda index: row(layer, index), jnp.arange(self.history)), 0, 2)

        return lax.map(of_layer, jnp.arange(cache.layers))

    def attend(self, role, token, cache, state: Any, handed, here: Here):
        assert cache is not None
        history = state[here.layer]
        batch, _, _, count = history.shape
        with jax.named_scope("attention/select"):
            candidates = self.blocks.candidates(here.lengths, cache.capacity)
            scores = self.predictor.predict(history, candidates)
            of_group = jnp.max(scores.reshape(batch, cache.kv_heads, -1, count), axis=2)
            positions = self.blocks.select(of_group, here.lengths)
        with jax.named_scope("attention/selection"):
            output, probabilities = attend_and_weigh(token.q, cache, positions, here.layer)
        calibrates = here.step % self.calibration == 0

        def exact():
            return self._exact(token.q, cache, here.lengths, **here.to_op)

        def found():
            return self._pooled(probabilities, positions, count)

        row = lax.cond(calibrates, exact, found)
        pushed = jnp.concatenate([history[:, :, 1:], row[:, :, None]], axis=2)
        state = state.at[here.layer].set(jnp.where(here.active[:, None, None, None], pushed, history))
        scored = jnp.where(calibrates, here.lengths.astype(jnp.float32), 0.0)
        return Attended(output, state, handed, selecting_trace(positions, scored, here), positions)

    def _exact(
        self, q: Float[Array, "batch query_heads head_dim"], cache: KVCache, lengths: Int[Array, " batch"], **to_op: Any
    ) -> Float[Array, "batch query_heads blocks"]:
        """The largest probability in every block, over the whole cache."""
        p = token_scores(q, cache, lengths, group_reduction="none", **to_op)
        cut_off = -cache.capacity % self.blocks.block
        p = jnp.pad(p, ((0, 0), (0, 0), (0, cut_off)))
        return jnp.max(p.reshape(*p.shape[:2], -1, self.blocks.block), axis=-1)

    def _pooled(
        self,
        probabilities: Float[Array, "batch query_heads entries"],
        positions: Int[Array, "batch kv_heads entries"],
        count: int,
    ) -> Float[Array, "batch query_heads blocks"]:
        """The largest probability in each of `count` blocks, over a selection; 0 in blocks of which it has none."""
        batch, heads, _ = probabilities.shape
        slots = jnp.repeat(positions, heads // positions.shape[1], axis=1)
        block = jnp.where(slots >= 0, slots // self.blocks.block, count)  # past the end: dropped
        rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
        nothing = jnp.zeros((batch, heads, count))
        return nothing.at[rows, columns, block].max(probabilities, mode="drop")


def attention_predictor(
    k: int = 1024,
    block: int = 16,
    sinks: int = 64,
    recent: int = 64,
    history: int = 64,
    calibration: int = 5,
    predictor: Prediction = "average",
    decay: float = 0.9,
    weights: str | None = None,
    dense_layers: tuple[int, ...] = (),
) -> Policy:
    """AttentionPredictor: each block's attention is predicted from its last `history` values, of which every
    `calibration`-th is exact, by a small CNN (from the file `weights`, if not its own) or, without training, by an
    average in which a row counts `decay` times as much as the one after it (Yang et al., arXiv 2502.04077)."""
    if predictor not in get_args(Prediction):
        raise ValueError(f"predictor={predictor!r} must be one of {', '.join(get_args(Prediction))}")
    method = AttentionPredictor(
        Blocks(k, block, sinks, recent),
        ExponentialAverage(decay) if predictor == "average" else Network(str(SHIPPED) if weights is None else weights),
        history,
        calibration,
        LayerPlan(dense=tuple(dense_layers)),
    )
    return Policy("attention-predictor", method)
