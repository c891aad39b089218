"""Selectors: which slots to keep, given their scores."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import select_tokens


@dataclass(frozen=True)
class TopK:
    """The current token, `sinks` first slots, and the best of the rest after max-pooling over `pool` slots.

    `k` counts everything a recycled step reads, per kv head. Sinks are never evicted.
    Raises ValueError, naming the argument, for values that cannot be.
    """

    k: int
    pool: int = 1
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1: the current token is always read")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd and at least 1")
        if not 0 <= self.sinks < self.k:
            raise ValueError(f"sinks={self.sinks} must be between 0 and k - 1 = {self.k - 1}")

    def select(
        self,
        scores: Float[Array, "batch kv_heads tokens"],
        lengths: Int[Array, " batch"],
        *,
        implementation: str | None,
    ) -> Int[Array, "batch kv_heads k"]:
        """Slots in the order of eviction, weakest first, -1 where there are fewer than `k`; see `Selection`."""
        return select_tokens(scores, lengths, k=self.k, pool=self.pool, sinks=self.sinks, implementation=implementation)

    def entry_for(self, positions: Int[Array, " batch"], steps_since: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """The entry that the token at `positions` overwrites, `steps_since` recycled steps after the refresh."""
        next_evicted = steps_since % (self.k - self.sinks)
        return jnp.where(positions < self.sinks, self.k - self.sinks + positions, next_evicted)
