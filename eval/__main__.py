"""`python -m eval --config configs/eval/NAME.yaml [--lengths … --policies …]`: one evaluation.

`python -m eval bench --config …` measures speed; `python -m eval compare RUN… [--form md] [--unpaired]` and
`python -m eval report RUN… --out DIR` put finished runs beside each other.

Exit status: 0 done, 1 a cell has failed, 2 bad input, with one line on standard error, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from recycled_jax.config_flags import parse_config


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = arguments[0] if arguments and arguments[0] in _COMMANDS else None
    try:
        if command is None:
            return _run(arguments)
        return _COMMANDS[command](arguments[1:])
    except KeyboardInterrupt:
        print("eval: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        said = " ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"eval: {' '.join(said.split())}", file=sys.stderr)
        return 2


def _run(arguments: Sequence[str]) -> int:
    from eval.config import EvalConfig
    from eval.run import evaluate

    return evaluate(parse_config(EvalConfig, arguments, prog="python -m eval", description=__doc__))


def _bench(arguments: Sequence[str]) -> int:
    from eval.bench import BenchConfig, bench

    bench(parse_config(BenchConfig, arguments, prog="python -m eval bench", description=BenchConfig.__doc__))
    return 0


def _compare(arguments: Sequence[str]) -> int:
    from eval.compare import compare

    def command(runs: list[Path], form: Literal["md", "csv", "json"] = "md", unpaired: bool = False) -> None:
        """Runs beside each other, as a table; different examples only when `unpaired`."""
        print(compare(runs, form=form, unpaired=unpaired))

    auto_cli(command, args=_as_list(arguments), as_positional=False)
    return 0


def _report(arguments: Sequence[str]) -> int:
    from eval.report import report

    def command(runs: list[Path], out: Path) -> None:
        """One HTML file of runs, in the folder `out`, with the data of its pictures beside it."""
        print(f"wrote {report(runs, out)}")

    auto_cli(command, args=_as_list(arguments), as_positional=False)
    return 0


def _as_list(arguments: Sequence[str]) -> list[str]:
    """`RUN…` before the flags as `--runs [RUN, …]`."""
    count = next((place for place, argument in enumerate(arguments) if argument.startswith("--")), len(arguments))
    if count == 0:
        raise ValueError("no run is named, expected the folders of one or more")
    return [*(f"--runs+={run}" for run in arguments[:count]), *arguments[count:]]


_COMMANDS = {"bench": _bench, "compare": _compare, "report": _report}

if __name__ == "__main__":
    sys.exit(main())
