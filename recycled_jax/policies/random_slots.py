"""Random slots at every step: the lower bound of all policies with a budget of k."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from recycled_jax.frame import Scorer, Selecting, TopK
from recycled_jax.policies.policy import Policy


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Every slot gets an independent uniform number, anew in every layer, kv head and step; the best k of them are a
    draw without replacement. Reads nothing.

    `frozen`: a slot keeps its number over the steps. The draw then changes only where a new token's number is above
    the lowest of those drawn, and is uniform over the past at every step all the same.

    The rows of a batch share their numbers, so that each draws what it draws alone.
    """

    seed: int = 0
    frozen: bool = False

    def score(self, token, cache, state, here):
        of_layer = jax.random.fold_in(jax.random.key(self.seed), here.layer)

        def numbers(head):
            key = jax.random.fold_in(jax.random.fold_in(of_layer, head), 0 if self.frozen else here.step)
            # the first of them are the same whatever the capacity
            return jax.random.uniform(key, (cache.capacity,))

        drawn = jax.vmap(numbers)(jnp.arange(cache.kv_heads))
        return jnp.broadcast_to(drawn[None], (cache.batch, *drawn.shape))

    def reads(self, lengths, cache):
        return jnp.zeros(lengths.shape)


def random_slots(k: int = 1024, seed: int = 0, sinks: int = 0, frozen: bool = False) -> Policy:
    """Random slots: self, the first `sinks` and a uniform draw of the rest, `k` in all; anew at every step or, with
    `frozen`, kept but for new tokens drawn in their place. What any selection of `k` slots has to beat (ours)."""
    return Policy("random", Selecting(RandomScorer(seed, frozen), TopK(k, sinks=sinks)))
