"""The limits that a row has to keep, and the exceptions that are granted with a reason."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tpu_check.compile import Figures
from tpu_check.jobs import Row
from tpu_check.programs import LimitName

Status = Literal["kept", "excepted", "broken"]


@dataclass(frozen=True)
class Waiver:
    """A limit that a program (by its name, or its operation) need not keep on a chip (None: on any), the looser `bound`
    that it keeps instead, and why."""

    program: str
    chip: str | None
    limit: LimitName
    bound: float
    reason: str


@dataclass(frozen=True)
class Verdict:
    """A limit, what the program has, and the bound that applied."""

    limit: LimitName
    value: float
    bound: float
    status: Status
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.limit} {self.value:.3g}, at most {self.bound:.3g}"
        return f"{text}: {self.reason}" if self.reason else text


def verdicts(row: Row, waivers: Sequence[Waiver]) -> list[Verdict]:
    """How a compiled row stands to its limits; nothing for one that did not compile."""
    if row.figures is None:
        return []
    found = []
    for limit, bound in row.program.limits.items():
        value, exact = _value(limit, row.figures)
        waiver = next((w for w in waivers if w.limit == limit and _applies(w, row)), None)
        if exact and value <= bound:
            found.append(Verdict(limit, value, bound, "kept"))
        elif waiver is not None and value <= waiver.bound:
            found.append(Verdict(limit, value, waiver.bound, "excepted", waiver.reason))
        else:
            reason = "" if exact else f"at least, not knowing the trips of {', '.join(row.figures.unknown)}"
            found.append(Verdict(limit, value, bound if waiver is None else waiver.bound, "broken", reason))
    return found


def _applies(waiver: Waiver, row: Row) -> bool:
    return waiver.program in (row.program.name, row.program.operation) and waiver.chip in (None, row.chip.name)


def _value(limit: LimitName, figures: Figures) -> tuple[float, bool]:
    """What a limit bounds, and whether that is all of it: it is not where the trips of a loop are unknown."""
    if limit == "copies":
        return len(figures.copies), True
    if limit == "temporaries":
        return figures.temporaries / figures.cache_bytes, True
    if limit == "unaliased":
        return max(0.0, 1 - figures.aliased / figures.donated), True
    exact = not figures.unknown
    if limit == "bundles_per_token":
        return figures.bundles / (figures.tokens or math.nan), exact
    if limit == "select":
        return static_us(figures) / (figures.attention_us or math.nan), exact
    return ratio(figures), exact


def static_us(figures: Figures) -> float:
    """The longer of moving the bytes and issuing the bundles."""
    return max(figures.hbm_us, figures.bundle_us)


def ratio(figures: Figures) -> float:
    """Static time over floor."""
    return static_us(figures) / figures.floor_us
