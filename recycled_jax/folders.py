"""Writing a folder so that a failure never leaves a half-written one behind."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LAST = "config.json"  # without it a checkpoint cannot be loaded, so it vouches for the rest


@contextmanager
def staged(path: str | Path, *, replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an error.

    A new folder appears in one rename. In a folder that exists, what matches the `replaces` patterns is
    removed, what has the same name is replaced, and everything else stays; `config.json` goes first and comes
    back last, so that the folder cannot be loaded while it is mixed. After an error in the block `path` is as
    it was.

    Raises FileExistsError when `path` is a file.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, expected a folder or a name that is free")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _remove(temporary)  # of a killed process that had this number
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            _move_into(temporary, path, replaces)
        else:
            temporary.rename(path)
    finally:
        _remove(temporary)


def _move_into(temporary: Path, path: Path, replaces: tuple[str, ...]) -> None:
    _remove(path / LAST)
    for stale in [old for pattern in replaces for old in path.glob(pattern)]:
        _remove(stale)
    for new in sorted(temporary.iterdir(), key=lambda file: file.name == LAST):
        _remove(path / new.name)
        new.rename(path / new.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
