"""The Llama-family decoder: linen holds the parameters, pure functions hold the mathematics.

`Llama` runs whole sequences (training, scoring). Decoding (`decode`) calls the same functions on one layer's weights
at a time and brings its own attention, so a block is written once: `attention_inputs` → attention →
`attention_output` → `mlp`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import causal_attention
from recycled_jax import rope
from recycled_jax.config import LlamaConfig
from recycled_jax.products import times
from recycled_jax.sharding import RULES, constrain, partition_spec
from recycled_jax.weights import layer_weights, model_weights

ACTIVATIONS = ("batch", "tokens", "features")
BY_TOKENS = ("batch", "kv_heads", "tokens", "head_dim")
REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
LayerWeights = Mapping[str, Array]
Remat = Literal["none", "dots", "full"]
Angles = tuple[Float[Array, "#batch tokens half"], Float[Array, "#batch tokens half"]]
# Attention of whole sequences from queries and keys before rotation, values, and the angles of their positions.
SequenceAttention = Callable[
    [
        Float[Array, "batch query_heads tokens head_dim"],
        Float[Array, "batch kv_heads tokens head_dim"],
        Float[Array, "batch kv_heads tokens head_dim"],
        Angles,
    ],
    Float[Array, "batch query_heads tokens head_dim"],
]


def causal(
    q: Float[Array, "batch query_heads tokens head_dim"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    angles: Angles,
) -> Float[Array, "batch query_heads tokens head_dim"]:
    """Every token attends itself and all tokens before it."""
    return causal_attention(rope.rotate(q, *angles), rope.rotate(k, *angles), v)


class Llama(nn.Module):
    """A Llama 2/3/3.1/3.2, Mistral, Qwen2 or Qwen3 decoder.

    `model.apply(params, tokens)` with tokens int32 `[batch, tokens]` gives float32 logits `[batch, tokens, vocab]`.
    Activations are `dtype`, parameters are created as `param_dtype`; norms, rotary angles and softmax sums are float32.
    `remat` says what the backward pass computes again instead of keeping it: `none`, everything of a block but its
    products with weights (`dots`), or the block (`full`). `attention` is that of whole sequences, for training with
    another than the causal one (`cca`, `recycled_attention`); it has no parameters. How tokens are decoded is a
    policy's affair. Given a `mesh`, activations lie on it as `sharding.RULES` say.
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    attention: SequenceAttention = causal
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        positions: Int[Array, "#batch tokens"] | None = None,
        head: Callable[[Mapping, LlamaConfig, Array], Any] | None = None,
    ) -> Any:
        """Logits of every next token. `positions` default to 0, 1, 2, …; they must increase along a row.

        `head(weights, config, x)` makes something else of the last layer's output: `logits` of some of its tokens, or a
        loss.
        """
        weights = {
            name: self.param(name, weight.init, weight.shape, self.param_dtype)
            for name, weight in model_weights(self.config).items()
        }
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        x = constrain(embed(weights, tokens, self.dtype), ACTIVATIONS, self.mesh)
        attention = self.attention if self.mesh is None else over_heads(self.attention, self.mesh, self.config)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # inferred from its default, 0, as int
            length=self.config.layers,
        )(self.config, self.param_dtype, attention, self.mesh, name="layers")
        x, _ = layers(x, rope.angles(self.config, positions))
        return (head or logits)(weights, self.config, x)


class Block(nn.Module):
    """One decoder layer over a whole sequence."""

    config: LlamaConfig
    param_dtype: DTypeLike
    attention: SequenceAttention
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, angles):
        w = {
            name: self.param(name, weight.init, weight.shape, self.param_dtype)
            for name, weight in layer_weights(self.config).items()
        }
        q, k, v = attention_inputs(w, self.config, x)
        with jax.named_scope("attention"):
            attended = self.attention(q, k, v, angles)
        x = constrain(x + attention_output(w, attended), ACTIVATIONS, self.mesh)
        return constrain(x + mlp(w, self.config, x), ACTIVATIONS, self.mesh), None


def over_heads(attention: SequenceAttention, mesh: Mesh, config: LlamaConfig) -> SequenceAttention:
    """`attention` with each device computing its rows and its heads, over all tokens.

    Where the mesh has a `sequence` axis, tokens are exchanged for heads before and back after (DeepSpeed-Ulysses, arXiv
    2309.14509): attentions need not know of it. Raises ValueError when the kv heads do not divide by `tensor` x
    `sequence`.
    """
    heads = partition_spec(("batch", "attention_heads", "all_tokens", "head_dim"), mesh)
    shards = math.prod(mesh.shape[name] for name in RULES["attention_heads"] if name in mesh.shape)
    if config.kv_heads % shards:
        raise ValueError(f"kv_heads={config.kv_heads} must be a multiple of tensor x sequence = {shards} of the mesh")

    def sharded(q, k, v, angles):
        rows = "batch" if angles[0].shape[0] > 1 else "one_row"
        of_angles = partition_spec((rows, "all_tokens", "head_dim"), mesh)
        specs = (heads, heads, heads, (of_angles, of_angles))
        exchanging = jax.shard_map(attention, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
        # Said on both sides, or the compiler gathers the tokens before they are projected.
        q, k, v = (constrain(x, BY_TOKENS, mesh) for x in (q, k, v))
        return constrain(exchanging(q, k, v, angles), BY_TOKENS, mesh)

    return sharded


def embed(weights: Mapping, tokens: Int[Array, "batch tokens"], dtype) -> Float[Array, "batch tokens embed"]:
    """The embeddings of `tokens`."""
    return weights["embed_tokens"][tokens].astype(dtype)


def attention_inputs(
    w: LayerWeights, config: LlamaConfig, x: Float[Array, "batch tokens embed"]
) -> tuple[
    Float[Array, "batch query_heads tokens head_dim"],
    Float[Array, "batch kv_heads tokens head_dim"],
    Float[Array, "batch kv_heads tokens head_dim"],
]:
    """Queries, keys and values of a layer, queries and keys before rotation (after q/k norm where there is one)."""
    with jax.named_scope("attention/project"):
        x = rms_norm(x, w["input_norm"], config.norm_eps)
        q, k, v = (_to_heads(x, w[name]) for name in ("q_proj", "k_proj", "v_proj"))
        if config.qkv_bias:
            q, k, v = (
                heads + w[name].astype(x.dtype)[None, :, None, :]
                for heads, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias"))
            )
        if config.qk_norm:
            q, k = rms_norm(q, w["q_norm"], config.norm_eps), rms_norm(k, w["k_norm"], config.norm_eps)
        return q, k, v


def attention_output(
    w: LayerWeights, attended: Float[Array, "batch query_heads tokens head_dim"]
) -> Float[Array, "batch tokens embed"]:
    """What attention adds to the residual stream."""
    with jax.named_scope("attention/output"):
        batch, _, tokens, _ = attended.shape
        merged = attended.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)
        return times(merged, w["o_proj"])


def _to_heads(
    x: Float[Array, "batch tokens embed"], weight: Float[Array, "embed heads head_dim"]
) -> Float[Array, "batch heads tokens head_dim"]:
    return times(x, weight).reshape(*x.shape[:2], *weight.shape[1:]).transpose(0, 2, 1, 3)


def mlp(
    w: LayerWeights, config: LlamaConfig, x: Float[Array, "batch tokens embed"]
) -> Float[Array, "batch tokens embed"]:
    """What the gated MLP adds to the residual stream."""
    with jax.named_scope("mlp"):
        x = rms_norm(x, w["mlp_norm"], config.norm_eps)
        return times(nn.silu(times(x, w["gate_proj"])) * times(x, w["up_proj"]), w["down_proj"])


def logits(
    weights: Mapping, config: LlamaConfig, x: Float[Array, "batch tokens embed"]
) -> Float[Array, "batch tokens vocab"]:
    """Float32 logits from the last layer's output."""
    with jax.named_scope("logits"):
        x = rms_norm(x, weights["final_norm"], config.norm_eps)
        if not config.tie_embeddings:
            return times(x, weights["lm_head"], jnp.float32)
        head = weights["embed_tokens"].astype(x.dtype)
        return jnp.einsum("bte,ve->btv", x, head, preferred_element_type=jnp.float32)


def rms_norm(
    x: Float[Array, "*shape width"], scale: Float[Array, " width"], eps: float
) -> Float[Array, "*shape width"]:
    """Root-mean-square norm over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype)[(None,) * (x.ndim - 1)]
