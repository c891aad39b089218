"""Command lines of programs whose settings are one dataclass: defaults < `--config FILE.yaml` < `--flags`."""

import re
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from recycled_jax.spelling import nearest


def parse_config[C](
    config: type[C],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    inner: Sequence[type] = (),
) -> C:
    """The config that a command line gives; `inner` are dataclasses that stand in its lists, whose fields may be
    misspelled too. Raises ValueError for bad input, naming the nearest to an unknown setting."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(config, sub_configs=True)
    try:
        values: dict[str, Any] = vars(parser.instantiate(parser.parse_args(arguments)))
    except ArgumentError as error:
        unknown = re.search(r"(?:Group '([\w.]+)'.*)?(?:[Oo]ption '|unrecognized arguments: --)([\w.]+)", str(error))
        missing = re.search(r"^Parser key \"config\": File does not exist: (.*)$", str(error))
        if missing is not None:
            raise ValueError(f"config={missing[1]} does not exist") from error
        if unknown is None:
            raise ValueError(str(error)) from error
        keys = [*parser.get_defaults().keys(), *(field.name for kind in inner for field in fields(kind))]
        name = ".".join(filter(None, unknown.groups()))
        raise ValueError(f"{name!r} is not a setting; {nearest(name, keys)}") from error
    values.pop("config")
    return config(**values)
