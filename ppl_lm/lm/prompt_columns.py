"""Containers of prompts, whatever library they are of, as plain lists: the prompts, and the columns beside them."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

GIVE = "give a list of strings or of chats, or a dataset"


def as_columns(prompts: Any) -> tuple[list[Any], dict[str, list[Any]]]:
    """The prompts and further columns, each read once.

    :param prompts: one string; strings, chats or rows with the key `prompt` in anything that can be iterated over; or a table
        with the column `prompt`: a mapping, a data set, a frame of pandas or polars, a table of pyarrow, a structured array.
    :raises ValueError: if it is none of these, or its columns differ in length."""
    if isinstance(prompts, str):
        return [str(prompts)], {}
    names = _names(prompts)
    if names is None:
        rows = _items(prompts)
        if rows is None:
            raise ValueError(f"prompts={prompts!r}; {GIVE}")
        if isinstance(prompts, Iterator) and not rows:
            raise ValueError(
                "the prompts' iterator gives none: it is empty, or was read before, which can be done once; give a list"
            )
        if not any(isinstance(row, Mapping) for row in rows):
            return rows, {}
        columns = _columns_of_rows(rows)
    else:
        if "prompt" not in names:
            hint = f", such as prompts[{names[0]!r}]" if names and _names(prompts[names[0]]) else ""
            raise ValueError(
                f"a dataset of prompts needs the column 'prompt'; it has {names}"
                + (f": give one of these data sets{hint}" if hint else "")
            )
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"the prompts have two columns {twice[0]!r}; give each a name of its own")
        columns = {name: _column(name, prompts[name]) for name in names}
    texts = columns.pop("prompt")
    for name, column in columns.items():
        if len(column) != len(texts):
            raise ValueError(f"column {name!r} has {len(column)} rows, the column 'prompt' has {len(texts)}")
    return texts, columns


def plain(value: Any) -> Any:
    """A text, or a chat as a list of dictionaries, whatever a library has made of it: arrays of messages, scalars."""
    if isinstance(value, str):
        return str(value)  # NumPy's too
    if hasattr(value, "as_py"):  # pyarrow's scalars
        return plain(value.as_py())
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()] if value.ndim else plain(value.item())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def key_of(value: Any) -> Hashable:
    """What is equal for equal values only: of arrays and tensors, which Python writes out in part, all that they hold."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return tuple((name, key_of(item)) for name, item in value.items())
    if isinstance(value, (list, tuple, np.ndarray)):
        return type(value).__name__, *map(key_of, value)
    return type(value).__name__, repr(value)


def require_unicode(text: Any, what: str) -> None:
    """:raises ValueError: if a text, or one in a chat, has half of a surrogate pair, which no tokenizer can read."""
    if isinstance(text, str):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} has half of a surrogate pair, {text[error.start]!r} at position {error.start}, which is no text: it "
                "was cut, or read with another encoding"
            ) from None
    elif isinstance(text, Mapping):
        for part in text.values():
            require_unicode(part, what)
    elif isinstance(text, Sequence):
        for part in text:
            require_unicode(part, what)


def _names(table: Any) -> list[Any] | None:
    """Names of the columns, None of what has none: a list, a column itself."""
    if isinstance(table, np.ndarray):
        names = table.dtype.names
    elif isinstance(table, Mapping):
        names = table.keys()
    else:
        names = getattr(table, "column_names", getattr(table, "columns", None))  # datasets, pyarrow; pandas, polars
    return None if names is None or callable(names) or not hasattr(table, "__getitem__") else list(names)


def _items(column: Any) -> list[Any] | None:
    """Of a column or an iterable, None of what is neither."""
    if hasattr(column, "to_pylist"):  # pyarrow
        return column.to_pylist()
    if isinstance(column, (str, bytes, Mapping)) or (isinstance(column, np.ndarray) and not column.ndim):
        return None
    if isinstance(column, Iterable):
        return list(column)
    if hasattr(column, "__getitem__") and hasattr(column, "__len__"):  # torch's data sets
        return [column[i] for i in range(len(column))]
    return None


def _column(name: Any, column: Any) -> list[Any]:
    items = _items(column)
    if items is None:
        raise ValueError(f"column {name!r} is {column!r}; give a list with one entry a prompt")
    return items


def _columns_of_rows(rows: list[Any]) -> dict[str, list[Any]]:
    """Of rows that are mappings, all with the keys of the first."""
    keys = rows[0].keys() if isinstance(rows[0], Mapping) else {}
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or "prompt" not in row or row.keys() != keys:
            given = list(row) if isinstance(row, Mapping) else row
            chat = isinstance(row, Mapping) and "role" in row
            raise ValueError(
                f"prompt {i} is {row!r}; a list of messages is one chat: give a list of chats, [[...]]"
                if chat and "prompt" not in row
                else f"row {i} has {given!r}; each row needs the key 'prompt', and the keys of the first row"
            )
    return {key: [row[key] for row in rows] for key in keys}
