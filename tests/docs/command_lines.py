"""Command lines as the documentation has them, given to the programs themselves up to where the work would begin.

Bash reads them, so quotes, loops and continued lines mean what they mean to a reader. The programs then parse what
they got with their own parsers and configs; only the function that does the work is replaced, by one that looks at
its arguments.
"""

import contextlib
import functools
import importlib
import inspect
import io
import operator
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jsonargparse
from packaging.requirements import Requirement

from eval.cells import TASKS
from eval.config import EvalConfig, chosen, split
from recycled_jax import cli
from recycled_jax.planning.slices import find_slice
from recycled_jax.policies import POLICIES
from recycled_jax.presets import PRESETS
from recycled_jax.tasks.retrieval import TASKS as RETRIEVAL_TASKS
from tests.docs.pages import ROOT

# Words in the place of a value, with one that the program takes.
PLACEHOLDERS = {"NAME": "recycled", "N": "2", "I": "0", "HOST:PORT": "localhost:1234"}
# What stands for a config of the reader's own.
OWN_CONFIGS = ("FILE.yaml",)
FOREIGN = ("git", "pre-commit")  # not ours: nothing of them is checked

Check = Callable[[dict[str, Any]], None]


def read_by_bash(script: str, folder: Path) -> list[list[str]]:
    """The commands that a script runs, each as its arguments; none is run but what bash has built in."""
    log = folder / "commands"
    log.unlink(missing_ok=True)
    # bash calls this for every program that it does not find, and it is told to find none
    handler = 'command_not_found_handle() { printf "%s\\0" "$@" $\'\\n\' >> "$LOG"; }\n'
    bash = shutil.which("bash")
    assert bash is not None, "bash, with which shell blocks are read, is missing"
    text = handler + script.replace(".venv/bin/", "")
    done = subprocess.run(
        [bash, "-euc", text],
        cwd=folder,
        env={"PATH": str(folder / "no programs"), "LOG": str(log)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, f"bash says {done.stderr!r}"
    if not log.exists():
        return []
    return [record.split("\0")[:-1] for record in log.read_text(encoding="utf-8").split("\n\0")[:-1]]


def accept(argv: Sequence[str], folder: Path) -> None:
    """Raises AssertionError with what the program says, unless it takes the command line."""
    empty = folder / "empty.yaml"
    empty.write_text("{}\n")
    program, *rest = [str(empty) if word in OWN_CONFIGS else PLACEHOLDERS.get(word, word) for word in argv]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), contextlib.chdir(ROOT):
        try:
            status = _run(program, rest)
        except SystemExit as done:
            status = done.code
        except (ValueError, OSError, SyntaxError) as error:
            status = str(error)
    assert status in (None, 0), f"{' '.join(argv)!r} is refused: {status} {said.getvalue().strip()}"


def flags_of(help_text: str) -> set[str]:
    return set(re.findall(r"--[a-z][\w.-]*\w", help_text))


def help_of(argv: Sequence[str], folder: Path) -> str:
    """What a program prints for `--help`."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _run(argv[0], [*argv[1:], "--help"])
    return text.getvalue()


def _run(program: str, arguments: list[str]) -> Any:
    if program in FOREIGN:
        return None
    if program == "python":
        kind, name, *arguments = arguments
        if kind == "-c":
            return compile(name, "-c", "exec") and None
        if kind == "-m" and name.startswith("tests."):
            return None if (ROOT / f"{name.replace('.', '/')}.py").exists() else f"{name} does not exist"
        program_of = (_MODULES.get(name) or _function_of(name)) if kind == "-m" else None
        return program_of(arguments) if program_of else f"python {kind} {name} is not a program of this project"
    if program not in _PROGRAMS:
        return f"{program} is not a program that the documentation may name"
    return _PROGRAMS[program](arguments)


def _main(module: str, work: dict[str, Check]) -> Callable[[list[str]], Any]:
    """The program whose `main` is in a module, with the functions that do the `work` ("module:function") replaced."""

    def run(arguments: list[str]) -> Any:
        main = importlib.import_module(module).main
        with contextlib.ExitStack() as replaced:
            for place, check in work.items():
                where, _, function = place.partition(":")
                looks = _looking(operator.attrgetter(function)(importlib.import_module(where)), check)
                replaced.enter_context(mock.patch(f"{where}.{function}", looks))
            return main(arguments)

    return run


def _function_of(module: str) -> Callable[[list[str]], Any] | None:
    """A program that is one function behind `jsonargparse.auto_cli`; None for a module that is not."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    found = re.search(r"auto_cli\((\w+), as_positional=False\)", path.read_text()) if path.exists() else None
    if found is None:
        return None

    def run(arguments: list[str]) -> Any:
        check = {"eval.retrieval": _retrieval, "eval.policies": _candidates}.get(module, _anything)
        looks = _looking(getattr(importlib.import_module(module), found[1]), check)
        jsonargparse.auto_cli(looks, args=arguments, as_positional=False)

    return run


def _looking(function: Callable, check: Check) -> Callable[..., None]:
    """A function of the same signature that checks its arguments and does nothing else."""

    @functools.wraps(function)
    def look(*args, **kwargs) -> None:
        given = inspect.signature(function).bind(*args, **kwargs)
        given.apply_defaults()
        check(given.arguments)

    return look


def _known(what: str, names: Sequence[str], valid: Any) -> None:
    for name in names:
        if name not in valid:
            raise ValueError(f"{what} {name!r} does not exist")


def _anything(given: dict[str, Any]) -> None:
    """The parser has said all."""


def _policies(given: dict[str, Any]) -> None:
    _known("policy", [given["name"]] if given["name"] else [], POLICIES)


def _plan(given: dict[str, Any]) -> None:
    _known("preset", [given["model"]], PRESETS)
    find_slice(given["topology"])


def _evaluate(given: dict[str, Any]) -> None:
    config: EvalConfig = given["config"]
    _known("task", [split(task)[0] for task in config.tasks], {*TASKS, "perplexity", "ruler"})


def _bench(given: dict[str, Any]) -> None:
    chosen(given["config"].policies, given["config"].budgets)


def _retrieval(given: dict[str, Any]) -> None:
    _known("task", given["tasks"], RETRIEVAL_TASKS)
    _known("policy", given["policies"], importlib.import_module("eval.retrieval").POLICIES)


def _candidates(given: dict[str, Any]) -> None:
    _known("policy", given["policies"] or [], importlib.import_module("eval.policies").CANDIDATES)


def _recycled(arguments: list[str]) -> Any:
    command = arguments[0] if arguments else ""
    work: dict[str, Check] = {}
    if command == "lm-eval":
        work = {"lm_eval._cli.harness:HarnessCLI.execute": _anything}
    elif command in cli.COMMANDS:
        check = {"policies": _policies, "plan": _plan}.get(command, _anything)
        work = {f"recycled_jax.commands.{command}:{command}": check}
    return _main("recycled_jax.cli", work)(arguments)


def _make(arguments: list[str]) -> Any:
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stderr if done.returncode else None


def _pip(arguments: list[str]) -> Any:
    """Of this project the extras must exist; of other packages only the form is checked."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    names = [word for word in arguments[1:] if re.match(r"[\w.]+[\w.-]*(\[|[=<>~!]|$)", word)]
    for wanted in (Requirement(re.sub(r"^\.(?=\[|$)", "recycled-jax", name)) for name in names):
        if wanted.name == "recycled-jax":
            _known("extra", sorted(wanted.extras), extras)


def _pytest(arguments: list[str]) -> Any:
    """Files and folders must exist."""
    chosen_by = {place + 1 for place, word in enumerate(arguments) if word in ("-k", "-m", "-n")}
    words = [word for place, word in enumerate(arguments) if place not in chosen_by and not word.startswith("-")]
    for path in (word.partition("::")[0] for word in words):
        if not (ROOT / path).exists():
            raise ValueError(f"{path} does not exist")


def _tpu_check(module: str) -> Callable[[list[str]], Any]:
    return lambda arguments: importlib.import_module(module).plan(arguments) and None


_EVAL = {"eval.run:evaluate": _evaluate, "eval.bench:bench": _bench}
_TABLES = {"eval.compare:compare": _anything, "eval.report:report": _anything}
_MODULES: dict[str, Callable[[list[str]], Any]] = {
    "eval": _main("eval.__main__", _EVAL | _TABLES),
    "train": _main("train.__main__", {"train.__main__:train": _anything}),
    "tpu_check": _tpu_check("tpu_check.__main__"),
    "tpu_check.pods": _tpu_check("tpu_check.pods"),
    "pytest": _pytest,
}
_PROGRAMS = {"recycled": _recycled, "make": _make, "pip": _pip}
