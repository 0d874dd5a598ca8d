"""A file of prompts: text, one a line, or JSON lines."""

import json
from pathlib import Path
from typing import Any


def read_prompts(path: Path | None) -> tuple[list[Any], dict[str, list[Any]]]:
    """Prompts and further columns: from a text file, one a line; from JSON lines with the key `prompt`.

    :raises ValueError: if the file is missing, empty or malformed."""
    if path is None:
        return [""], {}
    if not path.is_file():
        raise ValueError(f"prompts={str(path)!r}: there is no such file")
    lines = [line.strip("\r") for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"prompts={str(path)!r} is empty; give one prompt a line")
    if path.suffix not in (".jsonl", ".json"):
        return lines, {}
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"prompts={str(path)!r}, line {number} is not JSON: {error}") from None
        if not isinstance(rows[-1], dict) or "prompt" not in rows[-1] or rows[-1].keys() != rows[0].keys():
            given = ", ".join(rows[-1]) if isinstance(rows[-1], dict) else f"{type(rows[-1]).__name__}, no keys"
            raise ValueError(
                f"prompts={str(path)!r}, line {number} has {given}; each line needs 'prompt', and the keys of the first line"
            )
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return columns.pop("prompt"), columns
