"""Checkpoints in orbax format: `params/`, written by orbax, beside a `config.json` as Hugging Face has it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from recycled_jax.config import LlamaConfig
from recycled_jax.hf import config_json
from recycled_jax.model import Llama
from recycled_jax.sharding import param_shardings
from recycled_jax.weights import check_shapes, map_weights

PARAMS = "params"


def is_orbax(path: str | Path) -> bool:
    """Whether the folder `path` holds a checkpoint that `save_orbax` wrote."""
    return (Path(path) / PARAMS).is_dir()


def save_orbax(path: str | Path, model: Llama, params: Mapping) -> None:
    """Writes `params` and the config of `model` into the folder `path`; call it on every host.

    `params/` appears when it is complete, and not before.
    Raises ValueError when `path` already has parameters, or `params` are not those of `model`.
    """
    folder = Path(path).absolute()
    if is_orbax(folder):
        raise ValueError(f"path={str(path)!r} already holds a checkpoint, expected a new folder")
    check_shapes(model.config, params)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        partial = folder / f".config.json.{os.getpid()}"
        partial.write_text(config_json(model.config, params["params"]["embed_tokens"].dtype), encoding="utf-8")
        partial.replace(folder / "config.json")
    ocp.save(str(folder / PARAMS), params)


def load_orbax(path: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> tuple[Llama, dict]:
    """The model and parameters that `save_orbax` wrote into the folder `path`.

    `dtype` is that of parameters and computation; None keeps the stored one. With a `mesh`, parameters are
    read into the shardings of `sharding.param_shardings`, each process its own parts; without, onto the
    default device.

    Raises FileNotFoundError when the folder or its parts are missing, ValueError when they cannot be read or
    do not fit the config.
    """
    folder = Path(path).absolute()
    if not is_orbax(folder):
        raise FileNotFoundError(f"{folder} is not a checkpoint in orbax format, it has no folder {PARAMS}")
    config = LlamaConfig.from_hf(folder)
    stored = _stored_arrays(folder / PARAMS)
    check_shapes(config, stored)
    dtype = jnp.dtype(stored["params"]["embed_tokens"].dtype if dtype is None else dtype)
    if mesh is None:
        here = jnp.zeros(()).sharding  # the default device
        shardings = map_weights(config, lambda weight: here, lambda weight: here)
    else:
        shardings = param_shardings(config, mesh)
    wanted = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding), stored, shardings
    )
    try:
        params = ocp.load(str(folder / PARAMS), wanted)
    except (ValueError, OSError) as error:
        raise ValueError(_unreadable(folder / PARAMS, error)) from error
    return Llama(config, dtype=dtype, param_dtype=dtype), params


def _stored_arrays(path: Path) -> dict:
    """Shape and dtype of every stored array, in the tree of the parameters."""
    try:
        tree = ocp.metadata(str(path)).metadata
    except Exception as error:  # orbax's own errors share no public base class
        raise ValueError(_unreadable(path, error)) from error
    if not tree:  # what orbax answers when its description of the arrays is damaged
        raise ValueError(f"{path} cannot be read as an orbax checkpoint: it does not say which arrays it holds")
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)


def _unreadable(path: Path, error: Exception) -> str:
    # the rest of orbax's messages is a description of its storage stack, pages long
    reason = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0]
    return f"{path} cannot be read as an orbax checkpoint: {reason}"
