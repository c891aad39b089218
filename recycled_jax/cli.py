"""The console command `recycled`: finds the command, reads its flags, turns bad input into one sentence.

Exit status: 0 done; 2 bad input, with one line on standard error; 130 interrupted. Anything else is a bug and traces
back.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from jsonargparse import ArgumentParser

from recycled_jax.flags import parse
from recycled_jax.spelling import nearest

# A command is the function of its name in the module of its name under `commands`, imported only when it is asked for.
COMMANDS = {
    "demo": "Hide facts in a long text, ask for them, and compare policies on the embedded model.",
    "generate": "Continue one prompt on the terminal, or many from a JSONL file.",
    "convert": "Convert a checkpoint, Hugging Face to orbax or back.",
    "plan": "Compile a model for a TPU slice, without one: memory, floors, the largest batch.",
    "policies": "List the policies, or explain one.",
    "lm-eval": "Run lm-evaluation-harness with the model `recycled_jax` in it; all flags are the harness's.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's) and returns its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        if arguments and arguments[0] in COMMANDS:
            _run(*arguments)
        else:
            _overview(arguments)
        sys.stdout.flush()
    except SystemExit as done:  # help or version has been printed
        return int(done.code or 0)
    except KeyboardInterrupt as interrupt:
        print(f"recycled: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader has gone, as in `recycled policies | head`; the interpreter must not write to the pipe again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        print(f"recycled: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _run(name: str, *arguments: str) -> None:
    if name == "lm-eval":
        import_module("recycled_jax.commands.lm_eval").run_harness(arguments)
        return
    function = getattr(import_module(f"recycled_jax.commands.{name}"), name)
    function(**parse(function, arguments, prog=f"recycled {name}"))


def _overview(arguments: Sequence[str]) -> None:
    """Prints help or version and exits; raises ValueError for anything else."""
    parser = ArgumentParser(prog="recycled", version=version("recycled-jax"), exit_on_error=False, allow_abbrev=False)
    commands = parser.add_subcommands()
    for command, text in COMMANDS.items():
        commands.add_subcommand(command, ArgumentParser(), help=text)
    asked = arguments[0] if arguments else "--help"
    flags = ["-h", "--help", "--version"]
    if asked not in flags:
        kind = "flag" if asked.startswith("-") else "command"
        raise ValueError(f"{asked!r} is not a {kind} of recycled; {nearest(asked, [*COMMANDS, *flags])}")
    parser.parse_args([asked])


def _sentence(error: Exception) -> str:
    """An error on one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
