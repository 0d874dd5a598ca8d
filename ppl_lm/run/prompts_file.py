"""A file of prompts, read as what its suffix says it is."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ppl_lm.lm.prompt_columns import require_unicode

NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)?")  # group 1: not a whole one

Rows = list[tuple[str, Any]]  # where each stands, "line 3" say, and what stands there


def read_prompts(path: Path | None) -> tuple[list[Any], dict[str, list[Any]]]:
    """Prompts and further columns: from text, one prompt a line (.txt or no suffix); or from a table with the column `prompt`:
    .csv, .tsv, JSON lines (.jsonl, .ndjson), an array in .json, .parquet (with pyarrow). Text is UTF-8. Columns of a .csv that
    hold numbers alone are numbers.

    :param path: None: the empty prompt.
    :raises ValueError: if the file is missing, empty or malformed, in one message that names file and line or row."""
    if path is None:
        return [""], {}
    if not path.is_file():
        raise ValueError(f"prompts={str(path)!r}: there is no such file")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(
            f"prompts={str(path)!r} has a suffix that is not read; give one of {', '.join(s for s in READERS if s)}; a text "
            "file with one prompt a line is a .txt"
        )
    try:
        rows = READERS[suffix](path)
        if not rows:
            raise ValueError("is empty; give one prompt a line, or a table with the column 'prompt'")
        for where, row in rows:
            _require_row(where, row, rows[0][1])
    except (OSError, ValueError) as error:
        raise ValueError(f"prompts={str(path)!r}: {error}") from None
    columns = {key: [row[key] for _, row in rows] for key in rows[0][1]}
    return columns.pop("prompt"), columns


def _require_row(where: str, row: Any, first: Any) -> None:
    """:raises ValueError: if the row has no prompt, other keys than the first, or what a run's `config.json` cannot hold."""
    if not isinstance(row, dict) or "prompt" not in row or row.keys() != first.keys():
        given = ", ".join(map(str, row)) if isinstance(row, dict) else f"{type(row).__name__}, no keys"
        raise ValueError(f"{where} has {given}; each needs 'prompt', and the keys of the first")
    if not isinstance(row["prompt"], (str, list)):
        raise ValueError(f"{where} has the prompt {row['prompt']!r}; give a text or a list of chat messages")
    require_unicode(row, where)
    try:
        json.dumps(row, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} holds what JSON cannot write down ({error}); leave that column out, or make it text"
        ) from None


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Those that are not blank, numbered as an editor does."""
    for number, line in enumerate(_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line.strip():
            yield f"line {number}", line


def _plain(path: Path) -> Rows:
    return [(where, {"prompt": line}) for where, line in _lines(path)]


def _json_lines(path: Path) -> Rows:
    return [(where, _parsed(where, line)) for where, line in _lines(path)]


def _json(path: Path) -> Rows:
    """An array of rows or of prompts; or JSON lines."""
    if not _text(path).lstrip().startswith("["):
        return _json_lines(path)
    items = _parsed("it", _text(path))
    return [(f"row {i}", item if isinstance(item, dict) else {"prompt": item}) for i, item in enumerate(items, 1)]


def _parsed(where: str, text: str) -> Any:
    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{number} is no number that float64 can hold")
        return value

    try:
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _separated(delimiter: str) -> Callable[[Path], Rows]:
    def read(path: Path) -> Rows:
        reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
        header, rows, line = None, [], 1
        try:
            for cells in reader:
                where, line = f"line {line}", reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = [name.strip() for name in cells]
                    if "prompt" not in header or len(set(header)) < len(header):
                        raise ValueError(f"{where} names the columns {header}; one, and each once, must be 'prompt'")
                    continue
                if len(cells) != len(header):
                    raise ValueError(f"{where} has {len(cells)} cells, the first {len(header)}: {', '.join(header)}")
                rows.append((where, dict(zip(header, cells, strict=True))))
        except csv.Error as error:
            raise ValueError(f"line {line}: {error}") from None
        for name in set(header or ()) - {"prompt"}:
            numbers = _numbers([row[name] for _, row in rows])
            for (_, row), number in zip(rows, numbers, strict=True):
                row[name] = number
        return rows

    return read


def _numbers(cells: list[str]) -> list[Any]:
    """As whole numbers if all of them are, or as numbers, or as they stand: 007 is a name."""
    found = [NUMBER.fullmatch(cell.strip()) for cell in cells]
    if not all(found):
        return cells
    if any(match[1] for match in found if match):
        numbers = [float(cell) for cell in cells]
        return numbers if all(map(math.isfinite, numbers)) else cells
    return [int(cell) for cell in cells] if all(len(cell) < 4000 for cell in cells) else cells


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("to read .parquet needs pyarrow (pip install pyarrow); or give the table as .jsonl") from None
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except Exception as error:  # pyarrow has a dozen kinds
        raise ValueError(f"is no Parquet file that can be read: {error}") from None
    return [(f"row {i}", row) for i, row in enumerate(rows, 1)]


READERS: dict[str, Callable[[Path], Rows]] = {
    "": _plain,
    ".txt": _plain,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
