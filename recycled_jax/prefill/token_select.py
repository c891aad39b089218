"""TokenSelect's chunked prefill: for every chunk of a prompt, the heads vote on the slots that all its queries read."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import KVCache, prefill_attention, select_tokens
from recycled_jax.frame.prompt import PrefillAttention, PromptChunk
from recycled_jax.prefill.attention import attend_gathered, by_kv_head, gather_slots


@dataclass(frozen=True)
class TokenSelectPrefill(PrefillAttention):
    """Every chunk of a prompt reads its own tokens and a selection of `k` slots, one for all heads: the `sinks`, the
    `recent` ones up to the chunk's end, and those between that its mean query votes for.

    Each query head's vote is its softmax over the slots between; logits are multiplied by `vote_scale`. A vote is held
    in every chunk: the paper keeps a selection while queries are alike, which reads stale slots to save what here is
    one query in 512. Raises ValueError, naming the argument, for values that cannot be.
    """

    k: int
    sinks: int
    recent: int
    pool: int
    vote_scale: float

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be at least 0")
        if self.recent < 1:
            raise ValueError(f"recent={self.recent} must be at least 1: a token reads itself")
        if self.k < self.sinks + self.recent:
            raise ValueError(f"k={self.k} is below sinks + recent = {self.sinks + self.recent}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd and at least 1")
        if self.vote_scale <= 0:
            raise ValueError(f"vote_scale={self.vote_scale} must be above 0")

    def check(self, config, chunk):
        if chunk > self.recent:
            raise ValueError(
                f"prompts are read {chunk} tokens at a time, expected at most recent={self.recent} (of token-select): "
                "a chunk's own tokens are all read"
            )

    def attend(self, carried, handed, chunk, cache):
        read = chunk.q.shape[2]

        def dense():
            return prefill_attention(
                chunk.q, cache, chunk.start, layer=chunk.layer, implementation=chunk.implementation
            )

        def selected():
            ends = jnp.minimum(chunk.start + read, chunk.lengths)
            with jax.named_scope("prefill/select"):
                slots = select_tokens(
                    self.votes(chunk, cache)[:, None],
                    ends,
                    k=self.k,
                    pool=self.pool,
                    sinks=self.sinks,
                    recent=self.recent,
                    ordered=False,
                    implementation=chunk.implementation,
                )
            own = (chunk.start + jnp.arange(read))[None, None, :, None]
            visible = (slots >= 0)[:, :, None, :] & (slots[:, :, None, :] <= own)
            k, v = (gather_slots(stored, slots) for stored in (cache.keys(chunk.layer), cache.values(chunk.layer)))
            return attend_gathered(by_kv_head(chunk.q, cache.kv_heads), k, v, visible).reshape(chunk.q.shape)

        return lax.cond(chunk.start + read <= self.k, dense, selected), carried, handed

    def votes(self, chunk: PromptChunk, cache: KVCache) -> Float[Array, "batch capacity"]:
        """The logarithm of the votes for every slot, the lowest number for slots on which there is no vote.

        Logarithms, because unscaled logits spread so far that most votes are 0 in float32, and the rest of the
        selection would go to the earliest slots.
        """
        tokens, slots = jnp.arange(chunk.q.shape[2]), jnp.arange(cache.capacity)
        real = (chunk.start + tokens)[None, :] < chunk.lengths[:, None]
        total = jnp.sum(jnp.where(real[:, None, :, None], chunk.q.astype(jnp.float32), 0.0), axis=2)
        mean = total / jnp.maximum(jnp.sum(real, axis=1), 1)[:, None, None]
        keys = cache.keys(chunk.layer)
        grouped = mean.reshape(cache.batch, cache.kv_heads, -1, cache.head_dim).astype(keys.dtype)
        logits = jnp.einsum("bngd,bnud->bngu", grouped, keys, preferred_element_type=jnp.float32)
        ends = jnp.minimum(chunk.start + tokens.shape[0], chunk.lengths)
        between = (slots[None, :] >= self.sinks) & (slots[None, :] < ends[:, None] - self.recent)
        lowest = jnp.finfo(jnp.float32).min
        logits = jnp.where(between[:, None, None], logits * self.vote_scale, lowest)
        votes = jax.nn.logsumexp(jax.nn.log_softmax(logits, axis=-1), axis=(1, 2))
        return jnp.where(between, votes, lowest)


def token_select(
    k: int = 2688, sinks: int = 128, recent: int = 512, pool: int = 1, vote_scale: float = 1.0
) -> TokenSelectPrefill:
    """TokenSelect's chunked prefill: every chunk reads `sinks`, `recent` and the slots between that the heads vote for,
    `k` in all, one set for all heads (Wu et al., arXiv 2411.02886)."""
    return TokenSelectPrefill(k, sinks, recent, pool, vote_scale)
