"""CCA-Attention over whole sequences: the near past token by token, all before it through one core token per group
(Chen et al., ICML 2025, arXiv 2412.12465). `policies.cca` reads prompts and decodes by the same rule.

A core is the mean of its group's keys and values, weighted by how much the group's last token attends to each. The
paper takes that mean of the layer's inputs and projects it; projections are linear and the weights sum to 1, so the
mean of what was projected is the same, needs no inputs, and may differ from kv head to kv head. (Only a norm on keys,
Qwen3's, makes it differ: there it is ours.)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import causal_attention
from recycled_jax import rope
from recycled_jax.prefill.attention import attend_gathered, by_kv_head

MIN_BLOCK = 128  # queries that attend together, at least: keeps products large


@dataclass(frozen=True)
class CCA:
    """What a token sees: the cores of all groups of `group` tokens whose last is at least `window` tokens before it,
    and one by one the tokens after those groups, `window` to `window + group - 1` of them, itself included. So every
    token of the past is seen once (ours: the paper's formula counts one twice). Both may change after training.

    Called, it is an attention for `Llama`. Raises ValueError, naming the argument, for values that cannot be.
    """

    group: int = 16
    window: int = 1024

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1 token")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 token: the present one is always seen as itself")

    @property
    def longest(self) -> int:
        """The most tokens that are seen one by one."""
        return self.window + self.group - 1

    def cores_seen(self, lengths: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """Cores, from the first on, that a token sees; `lengths` count the tokens up to and with it."""
        return jnp.maximum((lengths - self.window) // self.group, 0)

    def visible(
        self, lengths: Int[Array, " queries"], cores: int, slots: Int[Array, "#queries entries"]
    ) -> Bool[Array, "queries all"]:
        """What each query sees of `cores` cores and then of the tokens in `slots`; negative ones are none."""
        seen = self.cores_seen(lengths)[:, None]
        local = (slots >= seen * self.group) & (slots < lengths[:, None])
        return jnp.concatenate([jnp.arange(cores)[None, :] < seen, local], axis=1)

    def __call__(
        self,
        bare_q: Float[Array, "batch query_heads tokens head_dim"],
        bare_k: Float[Array, "batch kv_heads tokens head_dim"],
        v: Float[Array, "batch kv_heads tokens head_dim"],
        angles: tuple[Float[Array, "#batch tokens half"], Float[Array, "#batch tokens half"]],
    ) -> Float[Array, "batch query_heads tokens head_dim"]:
        """Attention of every token; queries and keys come before rotation. Differentiable in all but the angles.

        Queries attend in blocks of `longest` tokens, each over its own block, the one before, and the cores: so many
        logits exist at a time, forward and backward. Work: tokens × (2 × block + tokens / group).
        """
        q, k = rope.rotate(bare_q, *angles), rope.rotate(bare_k, *angles)
        batch, _, tokens, head_dim = q.shape
        cores = (tokens - self.window) // self.group  # seen by the last token; nobody sees more
        if cores < 1:
            return causal_attention(q, k, v)
        with jax.named_scope("attention/cores"):
            core_k, core_v = self._cores(q, k, bare_k, v, angles, cores)
        block = min(max(self.longest, MIN_BLOCK), tokens)
        blocks = -(-tokens // block)

        def by_block(x: Float[Array, "batch heads tokens head_dim"]):
            padded = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * block - tokens), (0, 0)))
            return jnp.moveaxis(padded.reshape(batch, -1, blocks, block, head_dim), 2, 0)

        def with_previous(x: Float[Array, "blocks batch heads block head_dim"]):
            previous = jnp.pad(x[:-1], ((1, 0), (0, 0), (0, 0), (0, 0), (0, 0)))
            return jnp.concatenate([previous, x], axis=3)

        @jax.checkpoint
        def attend(inputs):
            number, q, k, v = inputs
            lengths = number * block + 1 + jnp.arange(block)
            slots = (number - 1) * block + jnp.arange(2 * block)
            visible = self.visible(lengths, cores, slots[None, :])
            k, v = jnp.concatenate([core_k, k], axis=2), jnp.concatenate([core_v, v], axis=2)
            visible = jnp.broadcast_to(visible, (batch, 1, *visible.shape))
            return attend_gathered(by_kv_head(q, k.shape[1]), k, v, visible).reshape(q.shape)

        keys, values = with_previous(by_block(k)), with_previous(by_block(v))
        attended = lax.map(attend, (jnp.arange(blocks), by_block(q), keys, values))
        return jnp.moveaxis(attended, 0, 2).reshape(batch, -1, blocks * block, head_dim)[:, :, :tokens]

    def _cores(self, q, k, bare_k, v, angles, cores: int):
        """Keys, rotated to the position of their groups' last tokens (ours; the paper does not say), and values of the
        first cores."""
        last = slice(self.group - 1, cores * self.group, self.group)

        def by_group(x: Float[Array, "batch kv_heads tokens head_dim"]):
            return x[:, :, : cores * self.group].reshape(*x.shape[:2], cores, self.group, -1)

        weights = core_weights(q[:, :, last], by_group(k))
        core_k = rope.rotate(core(weights, by_group(bare_k)), *(angle[:, last] for angle in angles))
        return core_k.astype(k.dtype), core(weights, by_group(v)).astype(v.dtype)


def core_weights(
    last_q: Float[Array, "batch query_heads groups head_dim"], k: Float[Array, "batch kv_heads groups group head_dim"]
) -> Float[Array, "batch kv_heads groups group"]:
    """How much each token of a group counts in its core, float32: attention of the group's last token within it, both
    rotated; the mean over a kv head's query heads (ours, for grouped heads)."""
    grouped = by_kv_head(last_q, k.shape[1])
    logits = jnp.einsum("bngcd,bncud->bngcu", grouped.astype(k.dtype), k, preferred_element_type=jnp.float32)
    return jnp.mean(jax.nn.softmax(logits * last_q.shape[-1] ** -0.5, axis=-1), axis=2)


def core(
    weights: Float[Array, "batch kv_heads groups group"], x: Float[Array, "batch kv_heads groups group head_dim"]
) -> Float[Array, "batch kv_heads groups head_dim"]:
    """The weighted mean of keys or values of each group, float32."""
    return jnp.einsum("bncu,bncud->bncd", weights, x.astype(jnp.float32))
