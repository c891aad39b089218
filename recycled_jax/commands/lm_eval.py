"""`recycled lm-eval`: lm-evaluation-harness as it is, with the model `recycled_jax` in it."""

import os
import sys
from collections.abc import Sequence


def run_harness(arguments: Sequence[str]) -> None:
    """The harness's own command line (`run --model recycled_jax --tasks …`, `ls tasks`, `--help`) with `arguments`.

    Raises ValueError when the harness is not installed, and for what `RecycledJax` refuses; SystemExit with the
    harness's status when it ends by itself.
    """
    try:
        import lm_eval.models  # pyright: ignore[reportMissingImports]  # noqa: F401  (registers the harness's own)
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(f"lm-eval needs {error.name}, which is missing: pip install 'recycled-jax[eval]'") from error
    import recycled_jax.lm_eval_plugin.model  # noqa: F401  (registers ours)

    _name_writer()
    own = sys.argv
    sys.argv = ["recycled lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = own


def _name_writer() -> None:
    """Of processes that decode together the first alone gets results and writes them."""
    import jax

    if jax.distributed.is_initialized():
        os.environ["LOCAL_RANK"] = str(jax.process_index())
