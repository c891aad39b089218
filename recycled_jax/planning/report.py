"""A plan as text, JSON and a picture."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recycled_jax.planning.fitting import spelled
from recycled_jax.planning.plan import Plan, Point
from recycled_jax.planning.programs import ProgramMemory

WHAT = (
    "Memory is what the TPU compiler says of the compiled programs, times are bytes over bandwidth: facts of compiled "
    "programs and floors, not measurements. Nothing ran on a TPU."
)
_COLUMNS = ("program", "weights", "cache", "selection", "other", "temporaries", "results", "total", "of the device")


def table(plan: Plan) -> str:
    """All of a plan, for a terminal."""
    setting = plan.setting
    chip = setting.slice.chip
    parts = [
        f"{setting.topology}: {setting.slice.devices} devices of {chip.hbm / 1e9:.1f} GB at "
        f"{chip.bandwidth / 1e12:.2f} TB/s; mesh {spelled(setting.mesh)}, batch {setting.batch}, context "
        f"{setting.context:,}, policy {setting.policy_name}, cache {setting.cache_dtype or 'bfloat16'}",
        WHAT,
    ]
    if setting.context > setting.config.max_length:
        parts.append(f"The model was trained for {setting.config.max_length:,} tokens, fewer than the context.")
    if plan.programs:
        rows = [_memory_row(program, chip.hbm) for program in plan.programs]
        parts.append("\nGB per device, as compiled\n" + _aligned([_COLUMNS, *rows]))
    parts.append("\n" + _floors(plan.point))
    if plan.points:
        parts.append("\nby context, from shapes; GB and ms per device\n" + _curve(plan))
    return "\n".join(parts)


def document(plan: Plan, compiler: str) -> dict[str, Any]:
    """A plan as JSON; bytes and milliseconds per device. `compiler` is the version of libtpu."""
    return {
        "about": WHAT,
        "versions": {"libtpu": compiler, **{name: version(name) for name in ("jax", "jaxlib", "recycled-jax")}},
        "setting": plan.setting.to_json(),
        "chip": {key: value for key, value in asdict(plan.setting.slice.chip).items() if key != "compiler_options"},
        "fits": plan.fits,
        "problem": None if plan.fits else plan.problem,
        "programs": [{**asdict(program), "total": program.total} for program in plan.programs],
        "too_large": None if plan.too_large is None else asdict(plan.too_large),
        **_point(plan.point),
        "sweep": [_point(point) for point in plan.points],
    }


def draw(plan: Plan, path: Path) -> None:
    """Memory, floors and ideal speed-ups over the contexts of the sweep."""
    points = plan.points or (plan.point,)
    contexts = [point.setting.context for point in points]
    chip = plan.setting.slice.chip
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    memory, times, gains = figure.subplots(1, 3)
    bottom = [0.0] * len(points)
    for part in ("weights", "cache", "selection"):
        top = [low + getattr(point.sizes, part) / 1e9 for low, point in zip(bottom, points, strict=True)]
        memory.fill_between(contexts, bottom, top, label=part, alpha=0.7)
        bottom = top
    memory.axhline(chip.hbm / 1e9, color="black", linestyle="--", label=f"{chip.name} device")
    memory.set(ylabel="GB per device", ylim=(0, 1.3 * chip.hbm / 1e9))
    for kind in ("full", "recycled", "mean"):
        times.plot(contexts, [point.floors.milliseconds(chip)[kind] for point in points], marker="o", label=kind)
    times.set(ylabel="floor of a step, ms", ylim=(0, None))
    gains.plot(contexts, [point.floors.speedup for point in points], marker="o", label="mean step")
    gains.plot(contexts, [point.floors.limit for point in points], marker="o", label="recycled step (limit)")
    gains.set(ylabel="ideal speed-up over full attention", ylim=(0, None))
    for axes in (memory, times, gains):
        axes.set(xlabel="context, tokens")
        if len(points) > 1:
            axes.set_xscale("log", base=2)
        axes.legend()
    told = f"{plan.setting.topology}, batch {plan.setting.batch}, {plan.setting.policy_name}"
    figure.suptitle(f"{told}: shapes and floors, not measured")
    figure.savefig(path)


def _memory_row(program: ProgramMemory, hbm: int) -> tuple[str, ...]:
    parts = [getattr(program, column) for column in _COLUMNS[1:-2]]
    return (program.name, *(f"{part / 1e9:.2f}" for part in (*parts, program.total)), f"{program.total / hbm:.0%}")


def _floors(point: Point) -> str:
    floors, chip = point.floors, point.setting.slice.chip
    times = floors.milliseconds(chip)
    kinds = {"full": floors.full, "refresh": floors.refresh, "recycled": floors.recycled, "mean": floors.mean}
    rows = [(f"{kind} step", f"{moved / 1e9:.3f} GB", f"{times[kind]:.2f} ms") for kind, moved in kinds.items()]
    stride = "never refreshes" if floors.stride == float("inf") else f"refresh every {floors.stride:g} steps"
    return (
        f"floors per device ({stride})\n{_aligned(rows)}\n"
        f"ideal speed-up over full attention: {floors.speedup:.2f}x, at most {floors.limit:.2f}x with longer strides\n"
        f"largest batch that fits on this mesh: {point.largest_batch}, by arithmetic"
    )


def _curve(plan: Plan) -> str:
    head = ("context", "memory", "fits", "full", "recycled", "mean", "speed-up", "limit", "largest batch")
    rows = []
    for point in plan.points:
        times = point.floors.milliseconds(plan.setting.slice.chip)
        rows.append(
            (
                f"{point.setting.context:,}",
                f"{(point.sizes.total + point.temporaries) / 1e9:.2f}",
                "yes" if point.fits else "no",
                *(f"{times[kind]:.2f}" for kind in ("full", "recycled", "mean")),
                f"{point.floors.speedup:.2f}x",
                f"{point.floors.limit:.2f}x",
                str(point.largest_batch),
            )
        )
    return _aligned([head, *rows])


def _point(point: Point) -> dict[str, Any]:
    floors = point.floors
    never = floors.stride == float("inf")  # JSON has no infinity
    return {
        "context": point.setting.context,
        "bytes": asdict(point.sizes),
        "fits_by_shapes": point.fits,
        "largest_batch": point.largest_batch,
        "floor_bytes": {**asdict(floors), "mean": floors.mean, "stride": None if never else floors.stride},
        "floor_ms": floors.milliseconds(point.setting.slice.chip),
        "ideal_speedup": floors.speedup,
        "ideal_speedup_limit": floors.limit,
    }


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
