"""The limits that a row has to keep, and the exceptions that are granted with a reason."""

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
    """A limit, what the program has (None: cannot be told, which breaks it), and the bound that applied."""

    limit: LimitName
    value: float | None
    bound: float
    status: Status
    reason: str = ""

    def __str__(self) -> str:
        value = "unknown" if self.value is None else f"{self.value:.3g}"
        text = f"{self.limit} {value}, at most {self.bound:.3g}"
        return f"{text}: {self.reason}" if self.reason else text


def verdicts(row: Row, waivers: Sequence[Waiver]) -> list[Verdict]:
    """How a compiled row stands to its limits; nothing for one that did not compile."""
    if row.figures is None:
        return []
    found = []
    for limit, bound in row.program.limits.items():
        value = _value(limit, row.figures)
        waiver = next((w for w in waivers if w.limit == limit and _applies(w, row)), None)
        if value is not None and value <= bound:
            found.append(Verdict(limit, value, bound, "kept"))
        elif value is not None and waiver is not None and value <= waiver.bound:
            found.append(Verdict(limit, value, waiver.bound, "excepted", waiver.reason))
        else:
            why = f"trips unknown of {', '.join(row.figures.unknown)}" if value is None and row.figures.unknown else ""
            found.append(Verdict(limit, value, bound if waiver is None else waiver.bound, "broken", why))
    return found


def _applies(waiver: Waiver, row: Row) -> bool:
    return waiver.program in (row.program.name, row.program.operation) and waiver.chip in (None, row.chip.name)


def _value(limit: LimitName, figures: Figures) -> float | None:
    if limit == "copies":
        return len(figures.copies)
    if limit == "temporaries":
        return figures.temporaries / figures.cache_bytes
    if limit == "unaliased":
        return max(0.0, 1 - figures.aliased / figures.donated)
    if figures.unknown:
        return None
    if limit == "bundles_per_token":
        return None if figures.tokens is None else figures.bundles / figures.tokens
    if limit == "select":
        return None if figures.attention_us is None else static_us(figures) / figures.attention_us
    return ratio(figures)


def static_us(figures: Figures) -> float:
    """The longer of moving the bytes and issuing the bundles."""
    return max(figures.hbm_us, figures.bundle_us)


def ratio(figures: Figures) -> float:
    """Static time over floor."""
    return static_us(figures) / figures.floor_us
