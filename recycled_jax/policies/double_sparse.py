"""DoubleSparse: logits of a few channels choose the slots, of which exact attention then reads all channels.

Which channels, a table says: those where queries and keys of sample texts have the largest products (`calibrate`), or,
without a table, those where the prompt's own have them.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pallas_kernels import causal_attention
from pallas_kernels.ops.one_query import softmax_weights
from recycled_jax import rope
from recycled_jax.frame import LastQueries, LayerPlan, Observer, Scorer, Selecting, TopK
from recycled_jax.model import Llama, attention_inputs, attention_output, embed, mlp
from recycled_jax.policies.policy import Policy

LabelBits = Literal[4, 16]
_LARGEST_CODE = 15  # of 4 bits
_TENSOR = "ranking"  # its name in a table's file


@dataclass(frozen=True)
class ChannelTable:
    """The channels of every kv head of a model, those with the largest products of query and key first. Hashable, for
    it is part of a policy."""

    layers: int
    kv_heads: int
    head_dim: int
    channels: bytes = field(repr=False)  # int16 [layers, kv_heads, head_dim]

    @property
    def ranking(self) -> Int[np.ndarray, "layers kv_heads head_dim"]:
        """All channels of every head, by rank."""
        return np.frombuffer(self.channels, np.int16).reshape(self.layers, self.kv_heads, self.head_dim)

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Raises ValueError where the table is of another model than one of these sizes."""
        table, model = (self.layers, self.kv_heads, self.head_dim), (layers, kv_heads, head_dim)
        if table != model:
            raise ValueError(f"table has (layers, kv_heads, head_dim) = {table}, the model has {model}")

    @staticmethod
    def of(ranking: Int[np.ndarray, "layers kv_heads head_dim"]) -> "ChannelTable":
        """Raises ValueError where the channels of a head are not each channel once."""
        if ranking.ndim != 3 or not (np.sort(ranking) == np.arange(ranking.shape[-1])[None, None, :]).all():
            raise ValueError(f"ranking, of shape {ranking.shape}, is not every channel once for each layer and kv head")
        layers, kv_heads, head_dim = ranking.shape
        return ChannelTable(layers, kv_heads, head_dim, ranking.astype(np.int16).tobytes())


def save_table(table: ChannelTable, path: str | Path) -> None:
    """Writes a safetensors file, for the knob `table`."""
    save_file({_TENSOR: np.ascontiguousarray(table.ranking)}, path)


def load_table(path: str | Path) -> ChannelTable:
    """What `save_table` has written. Raises FileNotFoundError, or ValueError for a file that holds no table."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"table={str(path)!r} is not a file; `calibrate` makes one")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"table={str(path)!r} is not a safetensors file: {error}") from error
    if _TENSOR not in tensors:
        raise ValueError(f"table={str(path)!r} has no tensor {_TENSOR!r}, only {', '.join(tensors) or 'nothing'}")
    return ChannelTable.of(tensors[_TENSOR])


def calibrate(model: Llama, params: Mapping, blocks: Int[np.ndarray, "blocks tokens"]) -> ChannelTable:
    """The channels by mean |query × key| over all tokens of the blocks, each block read by itself, query and key of the
    same token and after rotation, summed over the query heads of a kv head (the paper takes 256 texts of the Pile's
    validation set, packed into blocks of 512 tokens; the sum and one list per kv head are ours)."""
    if not len(blocks):
        raise ValueError("blocks is empty, expected at least one block of tokens")
    products = [np.asarray(_block_products(model, params, jnp.asarray(block[None])), np.float64) for block in blocks]
    return ChannelTable.of(np.argsort(-np.sum(products, axis=0), axis=-1, kind="stable"))


def calibrate_on_texts(
    model: Llama,
    params: Mapping,
    encode: Callable[[str], Sequence[int]],
    texts: Iterable[str],
    *,
    block: int = 512,
) -> ChannelTable:
    """`calibrate` on texts, tokenized by `encode` and packed one after the other into blocks of `block` tokens; what
    does not fill a block is left out. Raises ValueError for texts that do not fill a single one."""
    tokens = [token for text in texts for token in encode(text)]
    if len(tokens) < block:
        raise ValueError(f"texts have {len(tokens)} tokens, expected at least one block of {block}")
    whole = len(tokens) // block
    return calibrate(model, params, np.array(tokens[: whole * block], np.int32).reshape(whole, block))


@functools.partial(jax.jit, static_argnames="model")
def _block_products(
    model: Llama, params: Mapping, tokens: Int[Array, "1 tokens"]
) -> Float[Array, "layers kv_heads head_dim"]:
    config, weights = model.config, params["params"]
    angles = rope.angles(config, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :])

    def layer_step(x, w):
        q, k, v = attention_inputs(w, config, x)
        q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
        x = x + attention_output(w, causal_attention(q, k, v))
        return x + mlp(w, config, x), channel_products(q, k, jnp.ones(tokens.shape, bool))[0]

    _, products = lax.scan(layer_step, embed(weights, tokens, model.dtype), weights["layers"])
    return products


def channel_products(
    q: Float[Array, "batch query_heads tokens head_dim"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    in_use: Bool[Array, "batch tokens"],
) -> Float[Array, "batch kv_heads head_dim"]:
    """Sum of |query × key| of each channel over the tokens in use and the query heads of a kv head, float32."""
    grouped = q.astype(jnp.float32).reshape(k.shape[0], k.shape[1], -1, *k.shape[2:])
    products = jnp.abs(grouped * k.astype(jnp.float32)[:, :, None])
    return jnp.sum(jnp.where(in_use[:, None, None, :, None], products, 0.0), axis=(2, 3))


@dataclass(frozen=True)
class PromptProducts(Observer):
    """`channel_products` of each prompt's tokens, summed: float32 [layers, batch, kv_heads, head_dim]."""

    def start(self, config, *, batch, capacity, dtype):
        return jnp.zeros((config.layers, batch, config.kv_heads, config.head_dim))

    def observe(self, seen, chunk, cache):
        in_use = chunk.start + jnp.arange(chunk.q.shape[2])[None, :] < chunk.lengths[:, None]
        return seen.at[chunk.layer].add(channel_products(chunk.q, chunk.k, in_use))


@struct.dataclass
class Labels:
    """The channels of every key that are scored. Labels of 4 bits are codes: a value is `low` + code × `step`."""

    channels: Int[Array, "layers batch kv_heads channels"]
    labels: (
        Float[Array, "layers batch kv_heads capacity channels"] | UInt[Array, "layers batch kv_heads capacity channels"]
    )
    low: Float[Array, "layers batch kv_heads channels"]  # float32: smallest value of the channel in the prompt
    step: Float[Array, "layers batch kv_heads channels"]  # float32: a fifteenth of its range there


@dataclass(frozen=True)
class LabelScorer(Scorer):
    """The softmax of the logits that the strongest channels give, the largest of a kv head's query heads; labels keep
    one channel in `reduction`.

    `bits`: labels as the cache stores keys (16), or 4 bits a value, evenly over the range that the channel has in the
    prompt (ours; the paper does not give its rule).
    """

    reduction: int
    bits: LabelBits = 16
    table: ChannelTable | None = None

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ValueError(f"reduction={self.reduction} must be at least 1 (1 keeps all channels)")
        if self.bits not in get_args(LabelBits):
            raise ValueError(f"label_bits={self.bits} must be one of {', '.join(map(str, get_args(LabelBits)))}")

    @property
    def observers(self):
        return (LastQueries(1), PromptProducts()) if self.table is None else (LastQueries(1),)

    def begin(self, prefilled, *, implementation):
        cache, lengths = prefilled.cache, prefilled.prompts.lengths
        if cache.head_dim % self.reduction:
            raise ValueError(f"reduction={self.reduction} does not divide head_dim={cache.head_dim} of the model")
        kept = cache.head_dim // self.reduction
        if self.table is None:
            _, channels = lax.top_k(prefilled.prompts.seen(PromptProducts()), kept)
        else:
            self.table.check(cache.layers, cache.kv_heads, cache.head_dim)
            ranking = jnp.asarray(self.table.ranking)[:, None, :, :kept]
            channels = jnp.broadcast_to(ranking, (cache.layers, cache.batch, cache.kv_heads, kept))
        in_use = (jnp.arange(cache.capacity)[None, :] < lengths[:, None])[:, None, :, None]

        def of_layer(layer, state: Labels) -> Labels:
            values = jnp.take_along_axis(cache.keys(layer), channels[layer][:, :, None, :], axis=-1)
            wide = values.astype(jnp.float32)
            low = jnp.min(jnp.where(in_use, wide, jnp.inf), axis=2)
            step = (jnp.max(jnp.where(in_use, wide, -jnp.inf), axis=2) - low) / _LARGEST_CODE
            return Labels(
                channels,
                state.labels.at[layer].set(self._stored(values, low[:, :, None], step[:, :, None])),
                state.low.at[layer].set(low),
                state.step.at[layer].set(step),
            )

        dtype = cache.dtype if self.bits == 16 else jnp.uint4
        labels = jnp.zeros((cache.layers, cache.batch, cache.kv_heads, cache.capacity, kept), dtype)
        nothing = jnp.zeros(channels.shape)
        return lax.fori_loop(0, cache.layers, of_layer, Labels(channels, labels, nothing, nothing))

    def append(self, state, token, here):
        layer = here.layer
        values = jnp.take_along_axis(token.k, state.channels[layer], axis=-1)
        slots = jnp.where(here.active, here.lengths - 1, state.labels.shape[3])  # past the end: the row writes nothing
        rows = jnp.arange(values.shape[0])
        stored = self._stored(values, state.low[layer], state.step[layer])
        return state.replace(labels=state.labels.at[layer, rows, :, slots].set(stored, mode="drop"))

    def score(self, token, cache, state, here):
        layer, labels = here.layer, state.labels[here.layer]
        batch, kv_heads, _, _ = labels.shape
        q = token.q.reshape(batch, kv_heads, -1, token.q.shape[-1])
        q = jnp.take_along_axis(q, state.channels[layer][:, :, None, :], axis=-1)
        if self.bits == 4:
            # `low` would add the same to all logits of a query head
            q, labels = q * state.step[layer][:, :, None, :], labels.astype(jnp.float32)
        visible = (jnp.arange(cache.capacity)[None, :] < here.lengths[:, None])[:, None, :]
        q = q.reshape(batch, -1, q.shape[-1])
        # the scale of the whole key: a logit is approximated by its largest terms
        weights, total = softmax_weights(q, labels, visible, cache.head_dim**-0.5)
        return jnp.max(weights / total, axis=2)

    def reads(self, lengths, cache):
        # the codes beside keys of 16 bits
        return lengths * (self.bits / 16 / self.reduction)

    def _stored(self, values: Array, low: Array, step: Array) -> Array:
        """Label values as they are kept."""
        if self.bits == 16:
            return values
        codes = jnp.round((values - low) / jnp.where(step > 0, step, jnp.inf))
        return jnp.clip(codes, 0, _LARGEST_CODE).astype(jnp.uint4)


def double_sparse(
    k: int = 1024,
    reduction: int = 16,
    label_bits: LabelBits = 16,
    table: str | None = None,
    dense_layers: tuple[int, ...] = (0, 1),
) -> Policy:
    """DoubleSparse: every step estimates all logits from one channel in `reduction` and attends the `k` best slots
    (Yang et al., arXiv 2408.07092). `table` is a file of channels made from sample texts (`calibrate`, `save_table`);
    without one they are those of the prompt's own queries and keys (ours, as is one list of channels per kv head)."""
    channels = None if table is None else load_table(table)
    return Policy(
        "double-sparse",
        Selecting(LabelScorer(reduction, label_bits, channels), TopK(k), LayerPlan(dense=dense_layers)),
    )
