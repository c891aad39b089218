"""A policy: scorer × selector × schedule, and how a refresh attends."""

from dataclasses import dataclass
from typing import Literal, get_args

from recycled_jax.policies.schedules import QueryCheck, Schedule
from recycled_jax.policies.scorers import Scorer
from recycled_jax.policies.selectors import TopK

RefreshAttention = Literal["full", "selection"]
RowRule = Literal["per_row", "any", "all"]


@dataclass(frozen=True)
class Recycling:
    """How selections are made and when.

    `refresh`: what a refreshing step attends, the `full` cache (Recycled Attention, RefreshKV) or only the new
    `selection` (the paper's score-only ablation: values are not read). `rows`: whose wish decides in a batch.
    `per_row`: each row gets exactly what it gets alone, and scoring runs whenever some row wants it. `any`: all rows
    refresh when one wants, at the same cost; a row's result then depends on its neighbours. `all`: only when every
    row wants, the cheapest and stalest.
    """

    scorer: Scorer
    selector: TopK
    schedule: Schedule
    refresh: RefreshAttention = "full"
    rows: RowRule = "per_row"

    def __post_init__(self) -> None:
        if self.refresh not in get_args(RefreshAttention):
            raise ValueError(f"refresh={self.refresh!r} must be one of {', '.join(get_args(RefreshAttention))}")
        if self.rows not in get_args(RowRule):
            raise ValueError(f"rows={self.rows!r} must be one of {', '.join(get_args(RowRule))}")
        longest = self.schedule.longest_stride
        room = self.selector.k - self.selector.sinks
        if longest is not None and longest > room:
            checked = isinstance(self.schedule, QueryCheck) and longest > self.schedule.stride
            name = "max_stride" if checked else "stride"
            raise ValueError(
                f"{name}={longest} is above k - sinks = {room}: the tokens between two refreshes would evict the whole "
                f"selection; raise k or lower {name}"
            )
        if isinstance(self.schedule, QueryCheck) and self.rows == "all" and self.schedule.max_stride is None:
            raise ValueError("rows='all' needs max_stride, without it one row could keep all others from refreshing")

    @property
    def rows_agree(self) -> bool:
        """Whether all active rows of a batch refresh together."""
        return self.schedule.rows_agree or self.rows != "per_row"


@dataclass(frozen=True)
class Policy:
    """A named way to decode. `recycling` is None for the dense policy, which reads the whole cache at every step."""

    name: str
    recycling: Recycling | None = None
