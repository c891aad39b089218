"""`python -m train --config configs/train/NAME.yaml [--stages … --data.texts …]`: one training run."""

import sys

from jsonargparse import ArgumentParser

from train.config import TrainConfig
from train.loop import train


def main() -> int:
    parser = ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(TrainConfig, sub_configs=True)
    values = vars(parser.instantiate(parser.parse_args()))
    values.pop("config")
    config = TrainConfig(**values)
    try:
        print(f"exported {train(config)}")
    except (ValueError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
