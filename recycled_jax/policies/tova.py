"""TOVA: token omission via attention."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels import token_scores
from recycled_jax.frame.evicting import Evicting, Eviction
from recycled_jax.frame.prompt import LastQueries
from recycled_jax.policies.policy import Policy


@dataclass(frozen=True)
class LeastAttended(Eviction):
    """The token goes that the newest query attends least, in the mean over all query heads: the same for all kv heads
    of a layer. `protect_self`: never the newest token itself."""

    protect_self: bool = False

    @property
    def group_reduction(self):
        return "mean"

    def prompt_worth(self, prefilled, here):
        q = prefilled.prompts.seen(LastQueries(1)).q[here.layer, :, :, -1]
        scores = token_scores(q, prefilled.cache, here.lengths, group_reduction="mean", **here.to_op)
        return self.update(scores, scores)

    def update(self, worth, scores):
        # groups are equally large, so this mean of means is that over all query heads
        return jnp.broadcast_to(jnp.mean(scores, axis=1, keepdims=True), scores.shape)

    def rank(self, worth, positions, lengths):
        if not self.protect_self:
            return worth
        return jnp.where(positions == lengths[:, None, None] - 1, jnp.inf, worth)


def tova(k: int = 1024, protect_self: bool = False, keep_cache: bool = True) -> Policy:
    """TOVA: each step evicts for good the token that the present one attends least, in the mean over all heads of the
    layer; `k` are read, the present one among them, which may go itself unless `protect_self`. `keep_cache=False` drops
    the full cache (Oren et al., arXiv 2401.06104)."""
    return Policy("tova", Evicting(k, LeastAttended(protect_self), keep_cache))
