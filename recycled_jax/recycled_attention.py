"""Attention over whole sequences as recycled decoding would see them: what continued pre-training goes on with
(Xu, Goyal, Choi, arXiv 2411.05787, section 6; many chunks per sequence are ours).

A sequence is a prefix with causal attention, then chunks of `stride` tokens. The token before a chunk, its anchor,
scores all tokens up to itself, as a refresh does; the chunk attends those it selects, and its own tokens. Within a
layer no chunk waits for another: anchors' queries and all keys come from the layer's input.
"""

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import causal_attention
from recycled_jax import rope
from recycled_jax.frame import GroupReduction, TopK
from recycled_jax.frame.scorers import check_group_reduction
from recycled_jax.prefill.attention import attend_gathered, by_kv_head

AnchorAttention = Literal["recycled", "own", "full"]


@dataclass(frozen=True)
class RecycledAttention:
    """The last `chunks` × `stride` tokens of a sequence attend selections of `k` tokens; those before are the prefix.
    Without chunks it is causal attention. The paper trains with one chunk of 50 tokens behind 8,092, and k = 2048.

    `anchor`: what a chunk's last token attends, which selects for the next one: the `recycled` selection of its chunk,
    its `own`, as in a score-only refresh, or the `full` past, as in a full one. `evict`: every token of a chunk takes
    the place of the weakest token selected, as while decoding; if not (the paper), selections stay whole.

    Called, it is an attention for `Llama`. The choice has no gradient, attention to what was chosen has. Raises
    ValueError, naming the argument, for values that cannot be.
    """

    k: int = 2048
    stride: int = 50
    chunks: int = 1
    pool: int = 7
    group_reduction: GroupReduction = "max"
    anchor: AnchorAttention = "recycled"
    evict: bool = False

    def __post_init__(self) -> None:
        TopK(self.k, self.pool)  # refuses what cannot be
        check_group_reduction(self.group_reduction)
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1 token")
        if self.chunks < 0:
            raise ValueError(f"chunks={self.chunks} must be at least 0 (0 is causal attention)")
        if self.anchor not in get_args(AnchorAttention):
            raise ValueError(f"anchor={self.anchor!r} must be one of {', '.join(get_args(AnchorAttention))}")
        if self.evict and self.stride > self.k:
            raise ValueError(f"stride={self.stride} is above k={self.k}: a chunk would evict its whole selection")

    @property
    def selector(self) -> TopK:
        """That of the policy `recycled`."""
        return TopK(self.k, self.pool)

    def prefix(self, tokens: int) -> int:
        """Tokens before the first chunk of a sequence of `tokens`. Raises ValueError if there are none."""
        prefix = tokens - self.chunks * self.stride
        if prefix < 1:
            raise ValueError(
                f"a sequence of {tokens} tokens has no prefix before chunks={self.chunks} of stride={self.stride}; "
                f"expected at least {self.chunks * self.stride + 1}"
            )
        return prefix

    def __call__(
        self,
        bare_q: Float[Array, "batch query_heads tokens head_dim"],
        bare_k: Float[Array, "batch kv_heads tokens head_dim"],
        v: Float[Array, "batch kv_heads tokens head_dim"],
        angles: tuple[Float[Array, "#batch tokens half"], Float[Array, "#batch tokens half"]],
    ) -> Float[Array, "batch query_heads tokens head_dim"]:
        """Attention of every token; queries and keys come before rotation. Differentiable in all but the angles.

        One chunk attends at a time, over all tokens under a mask: logits for `stride` × tokens exist, forward and
        backward. The products are those of causal attention and half of (chunks × stride)² more. The selections,
        `chunks` × k slots for every row and kv head, are kept.
        """
        q, k = rope.rotate(bare_q, *angles), rope.rotate(bare_k, *angles)
        batch, heads, tokens, head_dim = q.shape
        prefix = self.prefix(tokens)
        attended = causal_attention(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix])
        if not self.chunks:
            return attended
        with jax.named_scope("attention/select"):
            # one more than there are chunks: the last token of all attends its own, if `anchor` says so
            selections = self._selections(lax.stop_gradient(q[:, :, prefix - 1 :: self.stride]), lax.stop_gradient(k))
        by_chunk = q[:, :, prefix:].reshape(batch, heads, self.chunks, self.stride, head_dim)

        # In float32 outside of the chunks, so that their gradients are summed in float32.
        wide_k, wide_v = k.astype(jnp.float32), v.astype(jnp.float32)

        @jax.checkpoint
        def attend(inputs):
            number, q, selection, own = inputs
            visible = self._visible(prefix + number * self.stride, selection, own, tokens)
            keys, values = wide_k.astype(k.dtype), wide_v.astype(v.dtype)
            return attend_gathered(by_kv_head(q, k.shape[1]), keys, values, visible).reshape(q.shape)

        with jax.named_scope("attention/chunks"):
            chunks = (jnp.arange(self.chunks), jnp.moveaxis(by_chunk, 2, 0), selections[:-1], selections[1:])
            of_chunks = jnp.moveaxis(lax.map(attend, chunks), 0, 2).reshape(batch, heads, -1, head_dim)
        return jnp.concatenate([attended, of_chunks], axis=2)

    def _selections(
        self,
        anchors: Float[Array, "batch query_heads anchors head_dim"],
        k: Float[Array, "batch kv_heads tokens head_dim"],
    ) -> Int[Array, "anchors batch kv_heads {self.k}"]:
        """What each anchor selects, in the order of eviction; -1 for nothing."""
        batch, kv_heads, tokens, head_dim = k.shape
        first = tokens - (anchors.shape[2] - 1) * self.stride  # length at the first anchor

        def select(inputs):
            number, q = inputs
            length = first + number * self.stride
            grouped = q.reshape(batch, kv_heads, -1, head_dim)
            logits = jnp.einsum("bngd,bntd->bngt", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
            logits = jnp.where(jnp.arange(tokens)[None, None, None, :] < length, logits, -jnp.inf)
            scores = getattr(jnp, self.group_reduction)(jax.nn.softmax(logits, axis=-1), axis=2)
            return self.selector.select(scores, jnp.full(batch, length), implementation=None)

        return lax.map(select, (jnp.arange(anchors.shape[2]), jnp.moveaxis(anchors, 2, 0)))

    def _visible(
        self,
        start: Int[Array, ""],
        selection: Int[Array, "batch kv_heads {self.k}"],
        own: Int[Array, "batch kv_heads {self.k}"],
        tokens: int,
    ) -> Bool[Array, "batch kv_heads {self.stride} {tokens}"]:
        """What the chunk that begins at token `start` sees; `own` is what its last token selects."""
        rank = functools.partial(_ranks, tokens=tokens)
        step = 1 + jnp.arange(self.stride)[None, None, :, None]  # of decoding, since the anchor
        token = jnp.arange(tokens)[None, None, None, :]
        chosen = rank(selection)[:, :, None, :] >= (step if self.evict else 0)
        visible = chosen | ((token >= start) & (token < start + step))
        if self.anchor == "recycled":
            return visible
        if self.anchor == "own":
            refreshed = rank(own)[:, :, None, :] >= 0
        else:
            refreshed = token < start + self.stride
        return jnp.where(step == self.stride, refreshed, visible)


def _ranks(selection: Int[Array, "batch kv_heads k"], *, tokens: int) -> Int[Array, "batch kv_heads {tokens}"]:
    """Where each token stands in a selection, -1 for those not in it."""

    def of_head(slots: Int[Array, " k"]) -> Int[Array, " tokens"]:
        places = jnp.where(slots < 0, tokens, slots)  # past the end: dropped
        return jnp.full(tokens, -1).at[places].set(jnp.arange(slots.shape[0]), mode="drop")

    # mapped, not indexed by row and head: rows and heads of other devices are then seen to be of no concern
    return jax.vmap(jax.vmap(of_head))(selection)
