"""`python -m tpu_check [--chips '[v5e,v6e]'] [--only NAME] [--short] [--out FILE.md]`: static figures of TPU programs.

Compiles every operation and every decode program for each chip with the real TPU compiler, on any machine, and holds
them to their limits. `--only` takes an operation (`decode_attention`) or one program of it (`decode_attention/8B/b1`).
`--short` is one chip and the main operations. The page goes to `--out`, with a `.json` of the same name beside it; a
run over everything writes docs/tpu_static.md when nothing else is said.

Exit status: 0 all limits kept; 1 a limit broken, or a program that does not compile; 2 bad input, or no TPU compiler.
"""

import json
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from jsonargparse import ArgumentParser
from tqdm import tqdm

from recycled_jax.planning.chips import CHIPS, Chip
from recycled_jax.spelling import nearest
from tpu_check import report
from tpu_check.catalogue import catalogue
from tpu_check.jobs import Row, run
from tpu_check.limits import verdicts
from tpu_check.programs import Program
from tpu_check.waivers import WAIVERS

PAGE = Path(__file__).parent.parent / "docs" / "tpu_static.md"
_SHORT_CHIPS = ["v5e"]
_OPTIONS = ("chips", "only", "short", "out")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        jobs, out = plan(argv)
        versions = report.versions()
    except PackageNotFoundError as error:
        print(f"tpu_check: {error.name} is not installed; `make tpu-check` installs the TPU compiler", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"tpu_check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    rows = []
    with tqdm(jobs, unit="program", file=sys.stderr) as progress:
        for program, chip in progress:
            progress.set_description(f"{program.name} {chip.name}")
            rows.append(run(program, chip))
            tqdm.write(line(rows[-1]), file=sys.stdout)
            if out is not None:  # after every row, so that an interrupted run leaves what it has
                write(out, rows)
    problems = report.broken(rows, WAIVERS)
    for problem in problems:
        print(f"tpu_check: {problem}", file=sys.stderr)
    print(f"{len(rows)} programs, {len(problems)} problems" + ("" if out is None else f"; see {out}"))
    return 1 if problems else 0


def plan(argv: Sequence[str] | None = None) -> tuple[list[tuple[Program, Chip]], Path | None]:
    """What a command line asks for: programs with their chips, and the page to write, if any. Raises ValueError for
    bad input."""
    parser = ArgumentParser(prog="python -m tpu_check", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--chips", type=list[str] | str | None, default=None, help=f"of {', '.join(CHIPS)}; default all"
    )
    parser.add_argument("--only", type=str | None, default=None, help="an operation, or one program of it")
    parser.add_argument("--short", action="store_true", help="one chip and the main operations")
    parser.add_argument("--out", type=str | None, default=None, help="Markdown file to write")
    try:
        values = parser.parse_args(argv)
    except ArgumentError as error:
        unknown = re.search(r"(?:[Oo]ption '|unrecognized arguments: --)([\w.]+)", str(error))
        if unknown is None:
            raise ValueError(str(error)) from error
        raise ValueError(f"{unknown[1]!r} is not an option; {nearest(unknown[1], _OPTIONS)}") from error
    chips = _chips(values.chips, values.short)
    programs = _programs(values.only, values.short)
    out = None if values.out is None else Path(values.out)
    if out is None and not (values.chips or values.only or values.short):
        out = PAGE
    if out is not None and (out.suffix != ".md" or not out.parent.is_dir()):
        raise ValueError(f"out={str(out)!r} is not a .md file in a folder that exists")
    return [(program, chip) for program in programs for chip in chips], out


def _chips(asked: list[str] | str | None, short: bool) -> list[Chip]:
    if asked is None:
        names = _SHORT_CHIPS if short else list(CHIPS)
    else:
        names = asked.split(",") if isinstance(asked, str) else asked
    for name in names:
        if name not in CHIPS:
            raise ValueError(f"chips has {name!r}, which is not known; {nearest(name, CHIPS)}")
    if not names:
        raise ValueError(f"chips is empty; expected some of {', '.join(CHIPS)}")
    return [CHIPS[name] for name in dict.fromkeys(names)]


def _programs(only: str | None, short: bool) -> list[Program]:
    programs = list(catalogue().values())
    if only is not None:
        chosen = [program for program in programs if only in (program.name, program.operation)]
        if not chosen:
            names = [*dict.fromkeys(program.operation for program in programs), *(program.name for program in programs)]
            raise ValueError(f"only={only!r} is not a program; {nearest(only, names)}")
        programs = chosen
    return [program for program in programs if program.short] if short and only is None else programs


def line(row: Row) -> str:
    """A row as the terminal gets it."""
    if row.figures is None:
        return f"FAILED {row.program.name} {row.chip.name}: {row.error}"
    judged = verdicts(row, WAIVERS)
    word = "BROKEN" if any(verdict.status == "broken" for verdict in judged) else "ok    "
    _, _, ran, moved, floor, hbm, bundles, ratio, *_, limits = report.row_line(row, judged)
    return (
        f"{word} {row.program.name} {row.chip.name} ({ran}): {moved}, floor {floor} µs, HBM {hbm} µs, "
        f"bundles {bundles} µs, ratio {ratio}, limits {limits}"
    )


def write(out: Path, rows: Sequence[Row]) -> None:
    """The page, and the same as JSON beside it."""
    out.write_text(report.markdown(rows, WAIVERS), encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(report.document(rows, WAIVERS), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
