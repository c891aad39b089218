"""JSON files whose errors name the file, the line and the field."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eval.finished.run import Numbers


def read_object(path: Path) -> dict[str, Any]:
    """All of a file. Raises ValueError where it is missing, malformed or no object."""
    if not path.exists():
        raise ValueError(f"{path} is missing")
    value = parse(path.read_text(encoding="utf-8"), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object")
    return value


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place, as errors tell it, and its object."""
    for place, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if text.strip():
            where = f"{path}, line {place}"
            value = parse(text, path, place)
            if not isinstance(value, dict):
                raise ValueError(f"{where}: expected an object")
            yield where, value


def parse(text: str, path: Path, line: int | None = None) -> Any:
    """`line` is the text's place in the file, of which it is all if it has none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line or error.lineno}: {error.msg}") from error


def take[T](values: Mapping[str, Any], name: str, kind: type[T], where: str) -> T:
    """A field that must be there. Raises ValueError that begins with `where`."""
    value = values.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {name}={value!r}; expected {kind.__name__}")
    return value


def number(values: Mapping[str, Any], name: str, where: str) -> float | None:
    """A number, None if it is not there."""
    return None if values.get(name) is None else finite(values, name, where)


def finite(values: Any, key: Any, where: str) -> float:
    """A number that must be there."""
    try:
        value = values[key]
    except (LookupError, TypeError):
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {key}={value!r}; expected a finite number")
    return float(value)


def numbers(values: Mapping[str, Any], name: str, where: str) -> Numbers:
    """A list of numbers and nulls; nothing if it is not there."""
    found = values.get(name)
    if found is None:
        return ()
    if not isinstance(found, list):
        raise ValueError(f"{where}: {name}={found!r}; expected a list")
    return tuple(None if one is None else finite({name: one}, name, where) for one in found)
