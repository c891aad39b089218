"""The report: rows and verdicts as a Markdown page for people and as JSON for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

from recycled_jax.planning.chips import Chip
from tpu_check.jobs import Row
from tpu_check.limits import Verdict, Waiver, ratio, verdicts
from tpu_check.programs import BUDGET, MODELS, TOKENS

_COLUMNS = (
    "program",
    "chip",
    "ran as",
    "HBM bytes",
    "floor µs",
    "HBM µs",
    "bundles × trips µs",
    "larger ÷ floor",
    "VMEM",
    "temporaries",
    "cache-shaped copies",
    "limits",
)
_HEAD = f"""# Static figures of the TPU programs

Made by `make tpu-check`; do not edit. **Every figure is a static estimate, read from programs that the TPU compiler has
compiled for a described chip on a machine without one. Nothing here has been measured on a TPU.**

The shapes are those of Llama-3.1-8B and Llama-3.2-1B (bfloat16) with {TOKENS:,} tokens in the cache and selections of
{BUDGET:,}; `b8` is a batch of 8. An operation works on one layer, a decode program on as many layers as the memory of
one device holds beside the cache, and says how many where not all do.

- **floor**: the bytes that must move between HBM and the device, whatever the implementation, ÷ its bandwidth (for
  `prefill_attention` and `causal_attention` the operations ÷ the peak rate where that is longer).
- **HBM bytes**: what the compiled DMAs move, a DMA under a predicate counted as if it always ran, but no array of a
  pipelined kernel more than once. **HBM µs**: those ÷ bandwidth.
- **bundles × trips**: VLIW bundles of one core, each loop's body times its trips, ÷ the clock. What stands under a
  predicate counts in full, of a conditional the dearer branch; waiting is not in it. `≥`: a trip count is not known.
  "not known": the compiler did not come to an end with writing them.
- **VMEM**: the most that one kernel takes for itself. **temporaries**: HBM beside arguments and results.
- **cache-shaped copies**: instructions that write an array as large as the cache, or a layer of it, or its keys.
"""


def markdown(rows: Sequence[Row], waivers: Sequence[Waiver]) -> str:
    """The whole page."""
    chips = {row.chip.name: row.chip for row in rows}
    groups = {row.program.operation: None for row in rows}
    parts = [_HEAD, f"Compiled with {', '.join(f'{name} {number}' for name, number in versions().items())}.\n"]
    parts.append(_chip_table(list(chips.values())))
    for operation in groups:
        lines = [row_line(row, verdicts(row, waivers)) for row in rows if row.program.operation == operation]
        parts.append(f"## {operation}\n\n{table(_COLUMNS, lines)}")
    parts.append(bullets("Limits broken", _judged(rows, waivers, "broken") + _failed(rows)))
    parts.append(bullets("Limits not kept, for a reason", _judged(rows, waivers, "excepted")))
    return "\n".join(parts)


def document(rows: Sequence[Row], waivers: Sequence[Waiver]) -> dict:
    """The same, ready for JSON."""
    return {
        "kind": "static estimate",
        "versions": versions(),
        "chips": {row.chip.name: asdict(row.chip) for row in rows},
        "rows": [
            {
                "program": row.program.name,
                "chip": row.chip.name,
                "error": row.error or None,
                "figures": None if row.figures is None else asdict(row.figures),
                "limits": [asdict(verdict) for verdict in verdicts(row, waivers)],
            }
            for row in rows
        ],
    }


def versions() -> dict[str, str]:
    """Of what decides the figures. Raises PackageNotFoundError where the TPU compiler is missing."""
    return {name: version(name) for name in ("jax", "jaxlib", "libtpu")}


def row_line(row: Row, judged: Sequence[Verdict]) -> list[str]:
    """The cells of a row."""
    figures = row.figures
    if figures is None:
        return [_label(row), row.chip.name, *("" for _ in _COLUMNS[3:]), "**failed**"]
    at_least = "≥ " if figures.unknown else ""
    return [
        _label(row),
        row.chip.name,
        ", ".join(sorted({name.split("/")[1] for name in figures.implementations})) or "xla",
        size(figures.hbm_bytes),
        _number(figures.floor_us),
        at_least + _number(figures.hbm_us),
        at_least + _number(figures.bundle_us) if figures.bundles else "not known",
        f"{at_least}{ratio(figures):.2f}",
        size(figures.vmem),
        size(figures.temporaries),
        str(len(figures.copies)),
        _summary(judged),
    ]


def _label(row: Row) -> str:
    text = " ".join(part for part in (row.program.what, row.program.model, f"b{row.program.batch}") if part)
    layers, whole = row.figures and row.figures.layers, MODELS[row.program.model].layers
    return f"{text}, {layers} of {whole} layers" if layers and layers < whole else text


def _summary(judged: Sequence[Verdict]) -> str:
    if not judged:
        return "none"
    told = [f"**{verdict}**" if verdict.status == "broken" else f"{verdict.limit} excepted" for verdict in judged]
    told = [text for text, verdict in zip(told, judged, strict=True) if verdict.status != "kept"]
    return "; ".join(told) or "kept"


def _judged(rows: Sequence[Row], waivers: Sequence[Waiver], status: str) -> list[str]:
    return [
        f"{row.program.name} on {row.chip.name}: {verdict}"
        for row in rows
        for verdict in verdicts(row, waivers)
        if verdict.status == status
    ]


def _failed(rows: Sequence[Row]) -> list[str]:
    return [f"{row.program.name} on {row.chip.name} did not compile: {row.error}" for row in rows if row.error]


def broken(rows: Sequence[Row], waivers: Sequence[Waiver]) -> list[str]:
    """A sentence for every broken limit and every row that did not compile."""
    return _judged(rows, waivers, "broken") + _failed(rows)


def _chip_table(chips: Sequence[Chip]) -> str:
    head = ("chip", "cores per device", "HBM TB/s per device", "HBM GB", "VMEM MiB per core", "clock GHz")
    lines = [
        [
            chip.name,
            str(chip.cores),
            f"{chip.bandwidth / 1e12:.2f}",
            f"{chip.hbm / 1e9:.0f}",
            f"{chip.vmem >> 20}",
            f"{chip.clock / 1e9:.2f}",
        ]
        for chip in chips
    ]
    source = (
        "From JAX's `tpu_info`; the clock is the peak bfloat16 rate ÷ what the matrix units take in a cycle. A v5p "
        "device is both cores of a chip, of which a kernel with nothing to split uses one; a TPU7x chip is two "
        "devices.\n"
    )
    options = [f"`{name}={value}` on {chip.name}" for chip in chips for name, value in chip.compiler_options.items()]
    told = f"\nCompiler options: {', '.join(options)}.\n" if options else ""
    return f"{table(head, lines)}\n{source}{told}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


def bullets(title: str, items: Sequence[str]) -> str:
    """A section with a line for every item."""
    return f"## {title}\n\n" + ("".join(f"- {item}\n" for item in items) or "None.\n")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(count: int) -> str:
    """Bytes, in three digits."""
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count} B"
