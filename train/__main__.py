"""`python -m train --config configs/train/NAME.yaml [--stages … --data.texts …]`: one training run.

Exit status: 0 done, or stopped by SIGTERM with a checkpoint; 2 bad input, or a loss that is not finite step after
step, with one line on standard error; 130 interrupted, without a checkpoint of that moment.
"""

import sys
from collections.abc import Sequence

from recycled_jax.config_flags import parse_config
from train.config import Stage, TrainConfig
from train.loop import train


def main(argv: Sequence[str] | None = None) -> int:
    try:
        exported = train(parse(argv))
    except KeyboardInterrupt:
        print("train: interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        said = " ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"train: {' '.join(said.split())}", file=sys.stderr)
        return 2
    if exported is not None:
        print(f"exported {exported}")
    return 0


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The config that a command line gives. Raises ValueError for bad input, naming the nearest to an unknown key."""
    return parse_config(TrainConfig, argv, prog="python -m train", description=__doc__, inner=(Stage,))


if __name__ == "__main__":
    sys.exit(main())
