"""`python -m tpu_check.pods [--only NAME] [--out FILE.md]`: the train step of every pod config, compiled for its pod.

Compiles with the real TPU compiler, on any machine, and holds each step to three limits: the memory of a chip, no
matrix of the model whole on every device, and no table as large as the embedding gathered. The page goes to `--out`,
with a `.json` of the same name beside it; a run over everything writes docs/tpu_pods.md when nothing else is said.

Exit status: 0 all limits kept; 1 a limit broken, or a step that does not compile; 2 bad input, or no TPU compiler.
"""

import json
import sys
import tempfile
from argparse import ArgumentError
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from jsonargparse import ArgumentParser
from tqdm import tqdm

from recycled_jax.planning.tpu_compiler import alone
from recycled_jax.spelling import nearest
from tpu_check import pod_report, report
from tpu_check.pod_report import PodRow
from tpu_check.train_programs import PODS, Pod, PodFigures

PAGE = Path(__file__).parent.parent / "docs" / "tpu_pods.md"
TIMEOUT = 3600  # seconds for one compile: minutes of a core, most of them for what devices exchange


def main(argv: Sequence[str] | None = None) -> int:
    try:
        pods, out = plan(argv)
        versions = report.versions()
    except PackageNotFoundError as error:
        print(f"tpu_check: {error.name} is not installed; `make tpu-check` installs the TPU compiler", file=sys.stderr)
        return 2
    except (ArgumentError, ValueError) as error:
        print(f"tpu_check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    rows = []
    with tqdm(pods, unit="pod", file=sys.stderr) as progress:
        for pod in progress:
            progress.set_description(pod.name)
            rows.append(run(pod))
            tqdm.write(pod_report.line(rows[-1]), file=sys.stdout)
            if out is not None:  # after every row, so that an interrupted run leaves what it has
                write(out, rows, versions)
    problems = [problem for row in rows for problem in pod_report.problems(row)]
    for problem in problems:
        print(f"tpu_check: {problem}", file=sys.stderr)
    print(f"{len(rows)} pods, {len(problems)} problems" + ("" if out is None else f"; see {out}"))
    return 1 if problems else 0


def plan(argv: Sequence[str] | None = None) -> tuple[list[Pod], Path | None]:
    """What a command line asks for: pods, and the page to write, if any. Raises ValueError or ArgumentError for bad
    input."""
    parser = ArgumentParser(prog="python -m tpu_check.pods", description=__doc__, exit_on_error=False)
    parser.add_argument("--only", type=str | None, default=None, help=f"one of {', '.join(PODS)}")
    parser.add_argument("--out", type=str | None, default=None, help="Markdown file to write")
    values = parser.parse_args(argv)
    if values.only is not None and values.only not in PODS:
        raise ValueError(f"only={values.only!r} is not a config for a pod; {nearest(values.only, PODS)}")
    out = None if values.out is None else Path(values.out)
    if out is not None and (out.suffix != ".md" or not out.parent.is_dir()):
        raise ValueError(f"out={str(out)!r} is not a .md file in a folder that exists")
    if values.only is not None:
        return [PODS[values.only]], out
    return list(PODS.values()), out or PAGE


def run(pod: Pod) -> PodRow:
    """Compiles the train step of a pod; never raises for what the compiler does."""
    with tempfile.TemporaryDirectory(prefix="tpu_check_") as folder:
        found = alone("tpu_check.train_programs", [pod.name], Path(folder) / "figures.json", TIMEOUT)
    if found is None:
        return PodRow(pod, None, f"no result after {TIMEOUT} s")
    return PodRow(pod, None, found) if isinstance(found, str) else PodRow(pod, PodFigures(**found))


def write(out: Path, rows: Sequence[PodRow], versions: dict[str, str]) -> None:
    """The page, and the same as JSON beside it."""
    out.write_text(pod_report.markdown(rows, versions), encoding="utf-8")
    out.with_suffix(".json").write_text(
        json.dumps(pod_report.document(rows, versions), indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
