"""`python -m train --config configs/train/NAME.yaml [--stages … --data.texts …]`: one training run.

Exit status: 0 done, or stopped by SIGTERM with a checkpoint; 2 bad input, or a loss that is not finite step after
step, with one line on standard error.
"""

import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields

from jsonargparse import ArgumentParser

from recycled_jax.spelling import nearest
from train.config import Stage, TrainConfig
from train.loop import train


def main(argv: Sequence[str] | None = None) -> int:
    try:
        exported = train(parse(argv))
    except (ValueError, OSError, FloatingPointError) as error:
        said = " ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"train: {' '.join(said.split())}", file=sys.stderr)
        return 2
    if exported is not None:
        print(f"exported {exported}")
    return 0


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The config that a command line gives. Raises ValueError for bad input, naming the nearest to an unknown key."""
    parser = ArgumentParser(prog="python -m train", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(TrainConfig, sub_configs=True)
    try:
        values = vars(parser.instantiate(parser.parse_args(argv)))
    except ArgumentError as error:
        unknown = re.search(r"(?:Group '([\w.]+)'.*)?(?:[Oo]ption '|unrecognized arguments: --)([\w.]+)", str(error))
        if unknown is None:
            raise ValueError(str(error)) from error
        keys = [*parser.get_defaults().keys(), *(field.name for field in fields(Stage))]
        name = ".".join(filter(None, unknown.groups()))
        raise ValueError(f"{name!r} is not a setting; {nearest(name, keys)}") from error
    values.pop("config")
    return TrainConfig(**values)


if __name__ == "__main__":
    sys.exit(main())
