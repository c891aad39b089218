"""A plan: what was compiled, what follows from shapes, and whether it fits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from recycled_jax.planning.fitting import Change, available, largest_batch, nearest_change, needed
from recycled_jax.planning.floors import Floors, floors
from recycled_jax.planning.programs import ProgramMemory, TooLarge
from recycled_jax.planning.setting import Setting
from recycled_jax.planning.sizes import Sizes, sizes


@dataclass(frozen=True)
class Point:
    """A setting by arithmetic: bytes per device from shapes, floors, the largest batch. `fits` leaves `temporaries`
    free, those of the setting that was compiled."""

    setting: Setting
    sizes: Sizes
    floors: Floors
    temporaries: int

    @property
    def fits(self) -> bool:
        return needed(self.setting, self.temporaries) <= available(self.setting)

    @property
    def largest_batch(self) -> int:
        return largest_batch(self.setting, self.temporaries)


@dataclass(frozen=True)
class Plan:
    """`programs` are empty where shapes alone do not fit; then, and where one of them is too large, `change` is the
    nearest setting that fits, if there is one. `points`: the curve over contexts."""

    point: Point
    programs: tuple[ProgramMemory, ...]
    too_large: TooLarge | None
    change: Change | None
    points: tuple[Point, ...]

    @property
    def setting(self) -> Setting:
        return self.point.setting

    @property
    def fits(self) -> bool:
        return bool(self.programs) and self.too_large is None

    @property
    def problem(self) -> str:
        """Why it does not fit, and what would: one sentence."""
        setting = self.setting
        wanted, there = needed(setting), setting.slice.chip.hbm
        refused = ""
        if self.too_large is not None:
            refused = f"the compiler refuses the {self.too_large.name}: "
            if self.too_large.wanted:
                wanted, there = self.too_large.wanted, self.too_large.available
        what = f"context={setting.context} with batch={setting.batch} does not fit {setting.topology}"
        change = "nothing known does" if self.change is None else str(self.change)
        return f"{what}: {refused}it needs {wanted / 1e9:.1f} of {there / 1e9:.1f} GB per device; {change}"


def make_plan(setting: Setting, contexts: Sequence[int], compile_programs: Any) -> Plan:
    """Compiles with `compile_programs` what fits by shapes.

    Raises ValueError as `floors` and `compile_programs` do.
    """
    found: list[ProgramMemory | TooLarge] = []
    bare = point(setting)
    if bare.fits:
        found = compile_programs(setting)
    programs = tuple(program for program in found if isinstance(program, ProgramMemory))
    too_large = next((program for program in found if isinstance(program, TooLarge)), None)
    temporaries = max((program.total - bare.sizes.total for program in programs), default=0)
    temporaries = max(temporaries, 0)
    if too_large is not None:
        temporaries = max(temporaries, too_large.wanted - bare.sizes.total)
    change = None if programs and too_large is None else nearest_change(setting, temporaries)
    points = tuple(point(replace(setting, context=context), temporaries) for context in contexts)
    return Plan(point(setting, temporaries), programs, too_large, change, points)


def point(setting: Setting, temporaries: int = 0) -> Point:
    """A setting by arithmetic."""
    return Point(setting, sizes(setting), floors(setting), temporaries)
