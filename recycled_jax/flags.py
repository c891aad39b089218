"""Command lines made from functions: names, types, defaults and help of the flags come from signature and docstring.

A keyword-only parameter `max_new_tokens: int = 128` is the flag `--max-new-tokens` and the YAML key `max_new_tokens`;
the other parameters are positional arguments. A parameter `policy: PolicyChoice` is `--policy NAME` with one
`--policy.KNOB` for each knob of that policy, in YAML `policy: {name: recycled, k: 4096}`; so is any other `Choice`.
Values come from defaults < `--config FILE.yaml` < flags.
"""

import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ActionYesNo, ArgumentParser

from recycled_jax.named import knobs_of
from recycled_jax.spelling import nearest


@dataclass(frozen=True)
class Choice:
    """Something by its registered name, with the knobs that are not at their defaults, or all of them."""

    name: str
    knobs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def factories(cls) -> Mapping[str, Callable]:
        """What there is to choose from. Its import takes JAX along, for which `recycled --help` need not wait."""
        raise NotImplementedError


@dataclass(frozen=True)
class PolicyChoice(Choice):
    """A policy to decode with."""

    name: str = "recycled"

    @classmethod
    def factories(cls):
        from recycled_jax.policies import POLICIES

        return POLICIES


@dataclass(frozen=True)
class PrefillChoice(Choice):
    """A way to read prompts; `policy` leaves it to the policy."""

    name: str = "policy"

    @classmethod
    def factories(cls):
        from recycled_jax.prefill.registry import PREFILLS

        return {"policy": lambda: None, **PREFILLS}


def parse(function: Callable, arguments: Sequence[str], *, prog: str) -> dict[str, Any]:
    """The keyword arguments for `function` that a command line gives.

    Raises ValueError for a flag, YAML key, policy or knob that does not exist, naming the nearest that does, and for a
    value of the wrong type; OSError for a config that cannot be read. Prints help and exits when asked to.
    """
    hints = get_type_hints(function)
    choices = {name: hint for name, hint in hints.items() if _is_choice(hint)}
    arguments = [_spelled(argument, [f"--{kind}" for kind in choices]) for argument in arguments]
    paths, arguments = _take(arguments, "--config")
    configs = {path: _read_yaml(path) for path in paths}
    parser = ArgumentParser(prog=prog, description=_description(function), exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with values for the flags below")
    flags = {"help": "--help", "config": "--config", "print_config": "--print_config"}
    flags |= _add_flags(parser, function)
    for kind, choice in choices.items():
        chosen = _chosen_name(kind, choice, arguments, configs)
        knobs = knobs_of(kind, choice.factories(), chosen)
        hints |= {f"{kind}.{knob}": hint for knob, (hint, _) in knobs.items()}
        flags |= _add_choice_flags(parser, kind, choice, chosen, knobs)
        _check_knobs(kind, chosen, knobs, arguments, configs)
    _check(arguments, configs, flags)
    try:
        # flags are read after the files, wherever they stand
        values = parser.parse_args([*(f"--config={path}" for path in paths), *arguments]).as_dict()
    except ArgumentError as error:
        raise ValueError(_readable(str(error), flags, hints)) from error
    for kind, choice in choices.items():
        knobs = values.pop(kind)
        values[kind] = choice(knobs.pop("name"), knobs)
    return {name: value for name, value in values.items() if name in hints}


def describe_type(hint: Any) -> str:
    """A type as a user reads it: `int`, `full | selection`, `float | none`, `list of int`, `mapping`."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) is dict:
        return "mapping"
    if get_origin(hint) is tuple:
        return f"list of {describe_type(get_args(hint)[0])}"
    if not get_args(hint):
        return hint.__name__
    parts = [describe_type(part) for part in get_args(hint)]
    return " | ".join("none" if part == "NoneType" else part for part in parts)


def _is_choice(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Choice)


def _add_flags(parser: ArgumentParser, function: Callable) -> dict[str, str]:
    hints = get_type_hints(function)
    docs = {
        param.arg_name: param.description for param in docstring_parser.parse(inspect.getdoc(function) or "").params
    }
    flags = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if _is_choice(hints[name]):
            continue
        settings: dict[str, Any] = {"help": re.sub(r"\s+", " ", docs.get(name) or "")}
        if parameter.kind is not parameter.KEYWORD_ONLY:
            if parameter.default is not parameter.empty:
                settings |= {"nargs": "?", "default": parameter.default}
            parser.add_argument(name, type=hints[name], **settings)
            continue
        flags[name] = f"--{name.replace('_', '-')}"
        if parameter.default is parameter.empty:
            settings["required"] = True
        else:
            settings["default"] = parameter.default
        if hints[name] is bool:
            parser.add_argument(flags[name], action=ActionYesNo(yes_prefix="", no_prefix="no-"), **settings)
            flags[f"no-{name}"] = f"--no-{name.replace('_', '-')}"
        else:
            parser.add_argument(flags[name], type=hints[name], **settings)
    return flags


def _add_choice_flags(
    parser: ArgumentParser, kind: str, choice: type[Choice], name: str, knobs: dict[str, tuple[Any, Any]]
) -> dict[str, str]:
    purpose = (inspect.getdoc(choice) or "").rstrip(".")
    text = f"{purpose}: --{kind} NAME for short, one of {', '.join(choice.factories())}; the flags below are its knobs."
    parser.add_argument(f"--{kind}.name", type=str, default=name, help=text)
    flags = {f"{kind}.name": f"--{kind}.name"}
    told = f"Knob of {name!r}" + (f", which `recycled policies {name}` explains" if kind == "policy" else "")
    for knob, (hint, default) in knobs.items():
        flags[f"{kind}.{knob}"] = f"--{kind}.{knob.replace('_', '-')}"
        parser.add_argument(flags[f"{kind}.{knob}"], type=hint, default=default, help=told)
    return flags


def _check(arguments: Sequence[str], configs: dict[str, dict], flags: dict[str, str]) -> None:
    for argument in arguments:
        flag = argument.partition("=")[0]
        if argument == "--":
            break
        of_mapping = any(flag.startswith(f"{known}.") for known in flags.values())
        if flag.startswith("--") and flag not in flags.values() and not of_mapping:
            valid = [known.removesuffix(".name") for known in flags.values()]
            raise ValueError(f"{flag} is not a flag of this command; {nearest(flag, valid)}")
    keys = [key for key in flags if key not in ("help", "config", "print_config") and not key.startswith("no-")]
    for path, config in configs.items():
        for key in _flatten(config, keys):
            if key not in keys:
                raise ValueError(f"{path} has the key {key!r}, which this command does not know; {nearest(key, keys)}")


def _check_knobs(
    kind: str, name: str, known: Iterable[str], arguments: Sequence[str], configs: dict[str, dict]
) -> None:
    flags = [argument.partition("=")[0] for argument in arguments]
    leaves = [f"{kind}.{knob}" for knob in known]
    keys = [key for config in configs.values() for key in _flatten(config, leaves)]
    given = [flag.removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")] + keys
    for knob in (full.removeprefix(f"{kind}.") for full in given if full.startswith(f"{kind}.")):
        if knob != "name" and knob.partition(".")[0] not in known:
            raise ValueError(f"{kind}.{knob} is not a knob of {name!r}; {nearest(knob, known)}")


def _readable(message: str, flags: dict[str, str], hints: dict[str, Any]) -> str:
    """jsonargparse's message; where it is about a value's type, in one sentence instead of its list of attempts."""
    found = re.search(r'Parser key "([^"]+)":.*value: (.*)$', message, re.DOTALL)
    if found is None or found[1] not in hints:
        return message
    return f"{flags.get(found[1], found[1])} is {found[2]!r}, expected {describe_type(hints[found[1]])}"


def _chosen_name(kind: str, choice: type[Choice], arguments: Sequence[str], configs: dict[str, dict]) -> str:
    name = choice().name  # pyright: ignore[reportCallIssue]  # all but the base class have a default
    for path, config in configs.items():
        if kind in config:
            if not isinstance(config[kind], dict):
                raise ValueError(f"{path} has {kind}: {config[kind]!r}, expected a mapping like {{name: {name}}}")
            name = config[kind].get("name", name)
    named, _ = _take(arguments, f"--{kind}.name")
    return named[-1] if named else str(name)


def _spelled(argument: str, kinds: Sequence[str]) -> str:
    """A flag in its one spelling: dashes for underscores, `--policy.name` for `--policy`."""
    flag, equals, value = argument.partition("=")
    if not flag.startswith("--") or flag == "--print_config":
        return argument
    flag = flag.replace("_", "-")
    return (f"{flag}.name" if flag in kinds else flag) + equals + value


def _take(arguments: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Every value given to `flag`, in order, and the arguments without them."""
    values, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == flag:
            value = next(remaining, None)
            if value is None:
                raise ValueError(f"{flag} needs a value")
            values.append(value)
        elif argument.startswith(f"{flag}="):
            values.append(argument.removeprefix(f"{flag}="))
        else:
            rest.append(argument)
    return values, rest


def _read_yaml(path: str) -> dict:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config={path!r} is not YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config={path!r} is not UTF-8 text: byte {error.start} is invalid") from error
    if not isinstance(content, dict):
        raise ValueError(f"config={path!r} holds a {type(content).__name__}, expected a mapping of flags to values")
    return content


def _flatten(config: dict, leaves: Sequence[str], prefix: str = "") -> Iterable[str]:
    """Dotted keys; a key that is among `leaves` may hold a mapping, which is its value."""
    for key, value in config.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in leaves:
            yield from _flatten(value, leaves, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _description(function: Callable) -> str:
    parsed = docstring_parser.parse(inspect.getdoc(function) or "")
    return "\n\n".join(filter(None, (parsed.short_description, parsed.long_description)))
