"""Files that are written whole or not at all, and JSON that is read or refused by the file's name."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """:raises ValueError: if the path is a folder."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """NaN and infinities, which JSON has not, become null."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same plain data with None for NaN and infinities."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not (abs(value) < float("inf")) else value


def write_draws(path: Path, data: Any) -> None:
    """What `to_arviz` gives, as NetCDF."""
    temporary = path.with_name(f".{path.name}.tmp")
    data.to_netcdf(str(temporary))
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Of JSON lines a list.

    :raises ValueError: of what is not JSON, by the file's name."""
    text = path.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
