"""Schedules: at which steps does a layer refresh its selection?"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QueryPoint = Literal["before_rope", "after_rope"]


class Schedule(ABC):
    """Decides for every row of a layer. Steps count from 1: the prefill has made the first selection."""

    @property
    def longest_stride(self) -> int | None:
        """Most steps from one refresh to the next; None when there is no bound."""
        return None

    @property
    def never(self) -> bool:
        """Whether no row ever wants a refresh: then nothing of one is compiled."""
        return False

    @property
    def rows_agree(self) -> bool:
        """Whether all rows of a batch always want the same."""
        return True

    @property
    def query_point(self) -> QueryPoint:
        """Which query is remembered and compared; the one before rotation where none is."""
        return "before_rope"

    @abstractmethod
    def wants(
        self,
        step: Int[Array, ""],
        steps_since: Int[Array, " batch"],
        similarity: Float[Array, " batch"],
    ) -> Bool[Array, " batch"]:
        """Whether each row wants a refresh at decode step `step`, `steps_since` recycled steps after its last one;
        `similarity` is the cosine between its head-averaged query now and then."""


@dataclass(frozen=True)
class FixedStride(Schedule):
    """Every `stride` steps (Recycled Attention, arXiv 2411.05787v1)."""

    stride: int

    def __post_init__(self) -> None:
        _at_least_one("stride", self.stride)

    @property
    def longest_stride(self) -> int:
        return self.stride

    def wants(self, step, steps_since, similarity):
        return jnp.broadcast_to(step % self.stride == 0, steps_since.shape)


@dataclass(frozen=True)
class QueryCheck(Schedule):
    """Every `stride` steps, if the query has turned away from that of the last refresh: cosine ≤ `threshold`
    (RefreshKV, ACL 2025); in any case after `max_stride` steps.

    `point`: which query enters the cosine. The paper does not say. The default is the one before rotary embedding:
    after it, similarity falls with the distance since the refresh even for equal content.
    """

    stride: int
    threshold: float
    max_stride: int | None = None
    point: QueryPoint = "before_rope"

    def __post_init__(self) -> None:
        _at_least_one("stride", self.stride)
        if self.max_stride is not None and self.max_stride < self.stride:
            raise ValueError(f"max_stride={self.max_stride} is below stride={self.stride}")
        if self.point not in ("before_rope", "after_rope"):
            raise ValueError(f"query_point={self.point!r} must be 'before_rope' or 'after_rope'")

    @property
    def longest_stride(self) -> int | None:
        return self.max_stride

    @property
    def rows_agree(self) -> bool:
        return False

    @property
    def query_point(self) -> QueryPoint:
        return self.point

    def wants(self, step, steps_since, similarity):
        wanted = (step % self.stride == 0) & (similarity <= self.threshold)
        return wanted if self.max_stride is None else wanted | (steps_since + 1 >= self.max_stride)


@dataclass(frozen=True)
class Never(Schedule):
    """The selection made after prefill stays, but for the new tokens that displace its weakest entries."""

    @property
    def never(self):
        return True

    def wants(self, step, steps_since, similarity):
        return jnp.zeros(steps_since.shape, bool)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1 (1 refreshes at every step)")
