"""Loading a model from a folder, whichever format it has."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from recycled_jax.hf import find_checkpoint, load_hf
from recycled_jax.model import Llama
from recycled_jax.orbax_io import is_orbax, load_orbax


def load_model(path: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> tuple[Llama, dict]:
    """The model and parameters at `path`: a folder in Hugging Face or orbax format, or a name in the local
    cache.

    `dtype`, `mesh` and errors are those of `hf.load_hf` and `orbax_io.load_orbax`.
    """
    folder = find_checkpoint(path)
    load = load_orbax if is_orbax(folder) else load_hf
    return load(folder, dtype=dtype, mesh=mesh)
