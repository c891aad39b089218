"""`recycled convert`: Hugging Face format to orbax and back."""

import shutil
import sys
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from recycled_jax.checkpoint import load_model
from recycled_jax.folders import staged
from recycled_jax.hf import find_checkpoint, save_hf
from recycled_jax.orbax_io import PARAMS, is_orbax, save_orbax
from recycled_jax.safetensors_io import INDEX
from recycled_jax.weights import parameter_count

# What a checkpoint carries beside config and weights, copied as it is.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def convert(
    source: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Converts a checkpoint: Hugging Face format to orbax, orbax to Hugging Face; there and back is bit-exact.

    The tokenizer's files are carried along, and `out` appears when it is complete. Works in host memory, which has to
    hold the model once.

    Args:
        source: Folder of a checkpoint in either format, or name of a model in the local Hugging Face cache.
        out: Folder to write, in the other format.
        dtype: Type of the weights in `out`; that of `source` when not given.
        overwrite: Replace the checkpoint in `out`, if it has one.

    Raises:
        FileExistsError: `out` is not empty and `overwrite` is not given.
        FileNotFoundError, ValueError: `source` is missing, damaged or not supported, as in `checkpoint.load_model`.
    """
    if not overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out={str(out)!r} exists and is not empty; name a new folder or give --overwrite")
    folder = find_checkpoint(source)
    form = "Hugging Face" if is_orbax(folder) else "orbax"
    print(f"converting {folder} to {form} …", file=sys.stderr)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model, params = load_model(folder, dtype=dtype)
        with staged(out, replaces=("model*.safetensors", INDEX, PARAMS)) as partial:
            if is_orbax(folder):
                save_hf(partial, model, params)
            else:
                save_orbax(partial, model, params)
            for name in COMPANIONS:
                if (folder / name).exists():
                    shutil.copyfile(folder / name, partial / name)
    print(f"wrote {out}: {parameter_count(model.config):,} parameters in {np.dtype(model.param_dtype)}")
