"""Pods' train steps: their limits, and the page and the JSON that tell of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tpu_check.report import bullets, size, table
from tpu_check.train_programs import AXES, Pod, PodFigures

_COLUMNS = (
    "config",
    "topology",
    "mesh",
    "rows × tokens",
    "memory",
    "of HBM",
    "arguments",
    "temporaries",
    "TFLOP of matrices",
    "of attention",
    "floor s",
    "TFLOP by the compiler",
    "its estimate, s",
    "exchanged",
    "compile s",
    "limits",
)
_HEAD = """# Static figures of the train steps for pods

Made by `make tpu-check`; do not edit. **Every figure is a static estimate, read from programs that the TPU compiler has
compiled for a described slice of a pod on a machine without a TPU. Nothing here has been measured on a TPU.**

Each row is the train step of a config in `configs/train`, whole, at its longest rows, as `python -m train` runs it.
Bytes and operations are those of one device in one step.

- **memory**: arguments + temporaries + results, without the results that take the place of arguments. **of HBM**: its
  share of the memory of a device.
- **TFLOP of matrices**, **of attention**: counted by hand, all layers. Products with weights: one forward, two
  backward, and in the layers one more where the backward pass computes them again. Attention kernels: 2 products of
  queries and keys forward, as many again where the layer is computed again, and 7 backward, half of each masked.
  **floor**: both ÷ the peak rate.
- **TFLOP by the compiler**, **its estimate**: its cost analysis, which takes the body of a loop for one run of it, of
  the layers as of the rings in which devices exchange, and leaves out Pallas calls, which attention is. No prediction
  of anything; they are here to be compared with those of other versions.
- **exchanged**: what a device gets from the others; each exchange in a loop times its trips.
- **compile s**: on the machine that made the page, which was doing other things too.

Limits: memory at most that of the chip; no array of the state (weights, moments) as large as a matrix of a layer whole
on every device; no all-gather of as many elements as the embedding table has.
"""


@dataclass(frozen=True)
class PodRow:
    """A pod and the figures of its train step, or why there are none."""

    pod: Pod
    figures: PodFigures | None
    error: str = ""


def problems(row: PodRow) -> list[str]:
    """A sentence for every broken limit, or for a step that did not compile."""
    figures, name = row.figures, row.pod.name
    if figures is None:
        return [f"{name} did not compile for {row.pod.topology}: {row.error}"]
    found = []
    if figures.memory > row.pod.chip.hbm:
        found.append(f"{name} takes {size(figures.memory)} of a device, at most {size(row.pod.chip.hbm)}")
    found += [f"{name} has {array} whole on every device" for array in figures.replicated]
    found += [f"{name} gathers a table as large as the embedding: {exchange}" for exchange in figures.gathered]
    return found


def line(row: PodRow) -> str:
    """A row as the terminal gets it."""
    if row.figures is None:
        return f"FAILED {row.pod.name}: {row.error}"
    word = "BROKEN" if problems(row) else "ok    "
    figures = row.figures
    return (
        f"{word} {row.pod.name} {row.pod.topology}: memory {size(figures.memory)} of {size(row.pod.chip.hbm)}, "
        f"{(figures.matrix_flops + figures.attention_flops) / 1e12:.0f} TFLOP, "
        f"exchanged {size(sum(figures.collectives.values()))}, compiler's estimate {_estimate(figures)} s, "
        f"compiled in {figures.compile_seconds:.0f} s"
    )


def markdown(rows: Sequence[PodRow], versions: Mapping[str, str]) -> str:
    """The whole page."""
    compiled = [(row, row.figures) for row in rows if row.figures is not None]
    kinds = list(dict.fromkeys(kind for _, figures in compiled for kind in figures.collectives))
    exchanged = [
        [row.pod.name, *(size(figures.collectives.get(kind, 0)) for kind in kinds)] for row, figures in compiled
    ]
    parts = [
        _HEAD,
        f"Compiled with {', '.join(f'{name} {number}' for name, number in versions.items())}.\n",
        table(_COLUMNS, [_cells(row) for row in rows]),
        f"## Exchanged, by kind\n\n{table(('config', *kinds), exchanged)}",
        *(bullets(f"Largest exchanges of {row.pod.name}", figures.largest) for row, figures in compiled),
        bullets("Limits broken", [problem for row in rows for problem in problems(row)]),
    ]
    return "\n".join(parts)


def document(rows: Sequence[PodRow], versions: Mapping[str, str]) -> dict[str, Any]:
    """The same, ready for JSON."""
    return {
        "kind": "static estimate",
        "versions": dict(versions),
        "rows": [
            {
                "config": row.pod.name,
                "topology": row.pod.topology,
                "hbm": row.pod.chip.hbm,
                "error": row.error or None,
                "figures": None if row.figures is None else asdict(row.figures),
                "problems": problems(row),
            }
            for row in rows
        ],
    }


def _cells(row: PodRow) -> list[str]:
    config, figures = row.pod.config, row.figures
    mesh = " × ".join(f"{axis} {number}" for axis in AXES if (number := getattr(config.mesh, axis)) > 1)
    stage = config.stages[-1]
    cells = [row.pod.name, f"`{row.pod.topology}`", mesh, f"{stage.batch} × {stage.length:,}"]
    if figures is None:
        return [*cells, *[""] * (len(_COLUMNS) - len(cells) - 1), "**failed**"]
    return [
        *cells,
        size(figures.memory),
        f"{figures.memory / row.pod.chip.hbm:.0%}",
        size(figures.arguments),
        size(figures.temporaries),
        f"{figures.matrix_flops / 1e12:.3g}",
        f"{figures.attention_flops / 1e12:.3g}",
        f"{(figures.matrix_flops + figures.attention_flops) / row.pod.chip.peak:.3g}",
        f"{figures.flops / 1e12:.3g}",
        # the sum over a program has been seen to come out negative
        _estimate(figures),
        size(sum(figures.collectives.values())),
        f"{figures.compile_seconds:.0f}",
        "**broken**" if problems(row) else "kept",
    ]


def _estimate(figures: PodFigures) -> str:
    """The compiler's; it has been seen to be negative, where it means nothing."""
    return f"{figures.estimate_seconds:.3g}" if figures.estimate_seconds > 0 else "not known"
