"""Selectors: which slots to keep, given their scores."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import select_tokens

Shared = Literal["max", "sum", "union"]


class Selector(ABC):
    """Turns scores into a selection. Implementations are frozen dataclasses."""

    @property
    @abstractmethod
    def entries(self) -> int:
        """Entries of a selection, those that stay empty included."""

    @property
    def unit(self) -> int:
        """Slots that are selected together: those of a page, or 1."""
        return 1

    def heads(self, kv_heads: int) -> int:
        """Selections per row: one per kv head, or 1 that they share."""
        return kv_heads

    @abstractmethod
    def select(
        self,
        scores: Float[Array, "batch heads units"],
        lengths: Int[Array, " batch"],
        *,
        implementation: str | None,
    ) -> Int[Array, "batch selections entries"]:
        """Slots, each at most once in a selection, self (slot `lengths - 1`) among them; -1 in empty entries."""


@dataclass(frozen=True)
class TopK(Selector):
    """The newest `recent` slots (self is one), `sinks` first slots, and the best of the rest after max-pooling over
    `pool` slots.

    `k` counts all of these, per kv head. Sinks are never evicted. Selections stand in the order of eviction, weakest
    first, behind `tail` more entries that are empty: the tokens of so many recycled steps evict nothing. `shared`: one
    selection for all kv heads, and how they agree on it (`select_tokens`).

    Raises ValueError, naming the argument, for values that cannot be.
    """

    k: int
    pool: int = 1
    sinks: int = 0
    recent: int = 1
    tail: int = 0
    shared: Shared | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1: the current token is always read")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd and at least 1")
        if not 0 <= self.sinks < self.k:
            raise ValueError(f"sinks={self.sinks} must be between 0 and k - 1 = {self.k - 1}")
        if not 1 <= self.recent <= self.k - self.sinks:
            raise ValueError(f"recent={self.recent} must be between 1 and k - sinks = {self.k - self.sinks}")
        if self.tail < 0:
            raise ValueError(f"tail={self.tail} must be at least 0 entries")

    @property
    def entries(self):
        return self.tail + self.k

    def heads(self, kv_heads):
        return 1 if self.shared else kv_heads

    def select(self, scores, lengths, *, implementation):
        chosen = select_tokens(
            scores,
            lengths,
            k=self.k,
            pool=self.pool,
            sinks=self.sinks,
            recent=self.recent,
            shared=self.shared,
            implementation=implementation,
        )
        return jnp.pad(chosen, ((0, 0), (0, 0), (self.tail, 0)), constant_values=-1)

    def entry_for(self, positions: Int[Array, " batch"], steps_since: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """The entry that the token at `positions` overwrites, `steps_since` recycled steps after the refresh."""
        first_sink = self.entries - self.sinks
        return jnp.where(positions < self.sinks, first_sink + positions, steps_since % first_sink)


@dataclass(frozen=True)
class TopPages(Selector):
    """All slots of the best pages of `page` slots; the page of the newest token is one of them. `k` slots are
    `k // page` pages. Takes scores of pages (`heads` × pages)."""

    k: int
    page: int

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ValueError(f"page={self.page} must be at least 1 slot")
        if self.k < self.page:
            raise ValueError(f"k={self.k} is below page={self.page}: the page of the current token is always read")

    @property
    def unit(self):
        return self.page

    @property
    def entries(self):
        return self.k // self.page * self.page

    def select(self, scores, lengths, *, implementation):
        pages = -(-lengths // self.page)  # in use
        chosen = select_tokens(scores, pages, k=self.k // self.page, ordered=False, implementation=implementation)
        slots = chosen[..., None] * self.page + jnp.arange(self.page)[None, None, None, :]
        in_use = (chosen[..., None] >= 0) & (slots < lengths[:, None, None, None])
        return jnp.where(in_use, slots, -1).reshape(*chosen.shape[:2], -1)
