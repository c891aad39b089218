"""Hugging Face checkpoints, read and written: `config.json`, safetensors and the tokenizer's files.

Which tensor becomes which parameter is in the tables of `weights`; both directions go through them, so a
round trip is bit-exact.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from recycled_jax.config import LlamaConfig
from recycled_jax.folders import staged
from recycled_jax.model import Llama
from recycled_jax.safetensors_io import DTYPES, INDEX, TensorReader, write_tensors
from recycled_jax.sharding import named_sharding
from recycled_jax.weights import Weight, check_shapes, layer_weights, map_weights, model_weights

EMBEDDING = "model.embed_tokens.weight"
# In old checkpoints, recomputed from the config by every reader.
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def load_hf(path: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> tuple[Llama, dict]:
    """The model and parameters of a Hugging Face checkpoint: `model.apply(params, tokens)`.

    `path` is a folder, or the name of a model in the local Hugging Face cache; nothing is downloaded. `dtype`
    is that of parameters and computation; None keeps the checkpoint's. With a `mesh`, parameters are born in
    the shardings of `sharding.param_shardings` and each process reads only its own parts; without, they lie
    on the default device. Host memory holds one weight of all layers at a time, beside what is already on the
    devices.

    Raises FileNotFoundError for a missing folder or file, and ValueError for a config that is not supported,
    a damaged file, and tensors that are missing, unknown, or of the wrong shape or dtype; each names what it
    is about.
    """
    folder = find_checkpoint(path)
    config = LlamaConfig.from_hf(folder)
    with TensorReader(folder) as reader:
        _check_tensors(reader, config)
        dtype = _common_dtype(reader, config) if dtype is None else jnp.dtype(dtype)
        count = len(model_weights(config)) + len(layer_weights(config))
        with _progress(f"reading {folder.name}", count) as progress:

            def read(names: list[str], weight: Weight, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
                progress.update()
                sharding = None if mesh is None else named_sharding(axes, mesh)
                return _device_array(reader, names, weight, shape, dtype, sharding)

            params = map_weights(
                config,
                lambda w: read([w.hf], w, w.shape, w.axes),
                lambda w: read(_layer_names(config, w), w, (config.layers, *w.shape), ("layers", *w.axes)),
            )
    return Llama(config, dtype=dtype, param_dtype=dtype), params


def save_hf(
    path: str | Path,
    model: Llama,
    params: Mapping,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face checkpoint to the folder `path`, the inverse of `load_hf`.

    Tensors are written in `dtype` (None: that of each parameter), in files of at most `max_shard_bytes`;
    `tokenizer` is a transformers tokenizer whose files are written beside. The folder is complete or not
    there: a checkpoint that was in it is replaced only when the new one is whole. Parameters must be
    addressable from this process; from several hosts, save with `orbax_io` and convert.

    Raises ValueError when `params` does not have the parameters of `model`.
    """
    config = model.config
    check_shapes(config, params)
    tensors = {hf: (_parameter(params, name, layer), weight, layer) for hf, name, weight, layer in _tensors(config)}
    dtype_of = {hf: jnp.dtype(array.dtype if dtype is None else dtype) for hf, (array, _, _) in tensors.items()}
    nbytes = {hf: math.prod(weight.shape) * dtype_of[hf].itemsize for hf, (_, weight, _) in tensors.items()}
    with staged(path, replaces=("model*.safetensors", INDEX)) as folder:
        with _progress(f"writing {Path(path).name}", len(nbytes)) as progress:

            def tensor(name: str) -> np.ndarray:
                progress.update()
                array, weight, layer = tensors[name]
                if layer is not None:
                    array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
                return weight.to_hf(np.asarray(array).astype(dtype_of[name]))

            write_tensors(folder, nbytes, tensor, max_shard_bytes)
        (folder / "config.json").write_text(config_json(config, dtype_of[EMBEDDING]), encoding="utf-8")
        _write_generation_config(folder, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def config_json(config: LlamaConfig, dtype: Any) -> str:
    """The text of a `config.json`; `dtype` is that of the weights it stands beside."""
    name = jnp.dtype(dtype).name
    # `torch_dtype` is what readers before transformers 5 look for
    return json.dumps({**config.to_hf(), "dtype": name, "torch_dtype": name}, indent=2) + "\n"


def find_checkpoint(path: str | Path) -> Path:
    """The folder `path`, or the snapshot of the model of that name in the local Hugging Face cache.

    Raises FileNotFoundError when there is neither; the message says how to get a model of that name.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"path={str(path)!r} is a file, expected the folder of a checkpoint")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)):
        raise FileNotFoundError(f"path={str(path)!r} does not exist, expected the folder of a checkpoint")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"path={str(path)!r} is neither a folder nor a model in the local Hugging Face cache; "
            f"get it with `hf download {path}`"
        ) from error


def _parameter(params: Mapping, name: str, layer: int | None) -> jax.Array:
    return params["params"][name] if layer is None else params["params"]["layers"][name]


def _layer_names(config: LlamaConfig, weight: Weight) -> list[str]:
    return [f"model.layers.{layer}.{weight.hf}" for layer in range(config.layers)]


def _tensors(config: LlamaConfig) -> Iterator[tuple[str, str, Weight, int | None]]:
    """Every tensor: Hugging Face name, our name, declaration, layer (None outside the layers)."""
    top = model_weights(config)
    yield top["embed_tokens"].hf, "embed_tokens", top.pop("embed_tokens"), None
    for layer in range(config.layers):
        for name, weight in layer_weights(config).items():
            yield f"model.layers.{layer}.{weight.hf}", name, weight, layer
    for name, weight in top.items():
        yield weight.hf, name, weight, None


def _check_tensors(reader: TensorReader, config: LlamaConfig) -> None:
    expected = {hf: weight.hf_shape for hf, _, weight, _ in _tensors(config)}
    stored = reader.names
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{reader.folder} lacks the tensor {name} of shape {shape}, which its config.json implies")
        if reader.shape(name) != shape:
            raise ValueError(f"{reader.folder} has {name} of shape {reader.shape(name)}, expected {shape}")
        if reader.dtype(name) not in DTYPES:
            raise ValueError(
                f"{reader.folder} has {name} of dtype {reader.dtype(name)}, expected one of {', '.join(DTYPES)}"
            )
    # a tied model's head is the embedding, whatever copy of it was stored
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    unknown = sorted(name for name in stored - set(expected) - ignored if not _HARMLESS.search(name))
    if unknown:
        raise ValueError(
            f"{reader.folder} has the tensor {unknown[0]}, which a {config.model_type} model "
            "with this config.json does not use; computing without it would give wrong results"
        )


def _common_dtype(reader: TensorReader, config: LlamaConfig) -> jnp.dtype:
    names = {reader.dtype(hf): hf for hf, _, _, _ in _tensors(config)}
    if len(names) > 1:
        found = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(names.items()))
        raise ValueError(f"dtype=None needs a checkpoint of one dtype, {reader.folder} has {found}; name a dtype")
    return jnp.dtype(DTYPES[names.popitem()[0]])


def _device_array(reader, names: list[str], weight: Weight, shape: tuple[int, ...], dtype, sharding) -> jax.Array:
    """One parameter of `shape`: the tensor `names[0]`, or the `names` of all layers stacked."""
    stacked = len(shape) > len(weight.shape)

    @cache  # devices that hold the same part share one array
    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return _read_part(reader, names[0], weight, index).astype(dtype)
        layers, part = names[index[0]], index[1:]
        first = _read_part(reader, layers[0], weight, part)
        array = np.empty((len(layers), *first.shape), dtype)
        array[0] = first
        for layer, name in enumerate(layers[1:], 1):
            array[layer] = _read_part(reader, name, weight, part)
        return array

    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


def _read_part(reader: TensorReader, name: str, weight: Weight, part: tuple[slice, ...]) -> np.ndarray:
    """The `part` of a weight in our layout, reading only the rows and columns that hold it.

    Each side of a stored matrix is a run of our dimensions flattened: a slice of the first of them is one
    range of rows or columns. The others are read whole and cut here.
    """
    dims = tuple(range(len(weight.shape)))
    if weight.inputs is None:
        runs = [(dim,) for dim in dims]
    else:
        runs = [run for run in (dims[weight.inputs :], dims[: weight.inputs]) if run]
    ranges, shape, rest = [], list(weight.shape), list(part)
    for run in runs:
        start, stop, _ = part[run[0]].indices(weight.shape[run[0]])
        inner = math.prod(weight.shape[dim] for dim in run[1:])
        ranges.append(slice(start * inner, stop * inner))
        shape[run[0]], rest[run[0]] = stop - start, slice(None)
    stored = reader.read(name, tuple(ranges))
    return replace(weight, shape=tuple(shape)).from_hf(stored)[tuple(rest)]


def _write_generation_config(folder: Path, config: LlamaConfig) -> None:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: value for name, value in config.to_hf().items() if name in names and value is not None}
    if special:
        (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def _progress(description: str, total: int) -> tqdm:
    # appears only in a terminal, and only when the work takes longer than a second
    return tqdm(total=total, desc=description, unit="tensor", delay=1, leave=False, disable=None)
