"""The tensors of a folder by name, whether they lie in one safetensors file or in several with an index."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors then returns
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# what a safetensors header calls the dtypes that weights come in
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorReader:
    """Reads tensors, or parts of them, from the safetensors files of `folder`; use it in a `with` statement.

    Raises FileNotFoundError when the folder has no safetensors file or lacks one that the index names,
    ValueError for a file or an index that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        try:
            self._file_of = self._open()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype in the words of the safetensors header, such as `BF16`."""
        return self._file_of[name].get_slice(name).get_dtype()

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """The `part` of tensor `name`, one slice for each of its dimensions; nothing else is read."""
        return self._file_of[name].get_slice(name)[part]

    def _open(self) -> dict:
        # one file before an index, as transformers does
        if (self.folder / SINGLE).exists():
            file = self._open_file(self.folder / SINGLE)
            return dict.fromkeys(file.keys(), file)
        if not (self.folder / INDEX).exists():
            raise FileNotFoundError(_no_safetensors(self.folder))
        file_names = _read_index(self.folder / INDEX)
        files = {}
        for file_name in sorted(set(file_names.values())):
            if not (self.folder / file_name).exists():
                raise FileNotFoundError(f"{self.folder / file_name} does not exist, but {INDEX} names it")
            files[file_name] = self._open_file(self.folder / file_name)
        stored = {file_name: set(file.keys()) for file_name, file in files.items()}
        for name, file_name in file_names.items():
            if name not in stored[file_name]:
                raise ValueError(f"{self.folder / file_name} has no tensor {name}, but {INDEX} places it there")
        return {name: files[file_name] for name, file_name in file_names.items()}

    def _open_file(self, path: Path):
        try:
            return self._stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def write_tensors(
    folder: Path, nbytes: Mapping[str, int], tensor_of: Callable[[str], np.ndarray], max_shard_bytes: int
) -> None:
    """Writes the tensors named in `nbytes` (name → bytes) into `folder`, asking `tensor_of(name)` for one at
    a time.

    One file when everything fits into `max_shard_bytes`, otherwise several of at most that size (a tensor
    larger than that has a file to itself) and an index. One file's tensors are in host memory at a time.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in nbytes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    total = len(shards)
    file_of = {}
    for number, names in enumerate(shards, 1):
        file_name = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        # transformers refuses files that do not say which framework's layout they have
        tensors = {name: tensor_of(name) for name in names}
        try:
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
            (folder / file_name).chmod(0o644)  # the library lets only the owner read it
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{folder / file_name} cannot be written: {error}") from error
        file_of.update(dict.fromkeys(names, file_name))
    if total > 1:
        index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors index with a weight_map: {error!r}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file_name, str) for file_name in weight_map.values()):
        raise ValueError(f"{path} is not a safetensors index: its weight_map must map tensor names to file names")
    # a name with a folder in it could lead out of the checkpoint
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise ValueError(f"{path} names the file {outside[0]!r}, expected a file of the same folder")
    return weight_map


def _no_safetensors(folder: Path) -> str:
    pickled = sorted(file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} has {pickled[0]} but no {SINGLE}: pickled weights are never read, "
            "convert them to safetensors (load with transformers, then save_pretrained)"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}"
