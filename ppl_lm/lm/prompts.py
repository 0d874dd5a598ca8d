"""`Prompts`: what a language model is asked to continue, tokenised once and left-padded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Int
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor

from ppl_lm.lm.prompt_names import distinct, readable
from ppl_lm.lm.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of batch shape S, usually (B,); (K, B) where a second text is prompted by a first.

    :param ids: (*S, P) int64, left-padded.
    :param lengths: (*S,) int64, tokens of each prompt; masks come from these.
    :param texts: the prompts as given, flat in row-major order: strings, or lists of chat messages.
    :param columns: further data for the reward, each a flat list in the same order.
    """

    ids: Int[Tensor, "*S P"]
    lengths: Int[Tensor, "*S"]
    texts: list[Any]
    vocabulary: Vocabulary
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def make(cls, prompts: Any, vocabulary: Vocabulary, device: torch.device | str = "cpu") -> "Prompts":
        """From a list of strings, a list of chats, a mapping or a dataset with the column `prompt`, or one string.

        :raises ValueError: if a prompt is neither text nor a chat, or a column has another length."""
        if isinstance(prompts, Prompts):
            vocabulary.require_same(prompts.vocabulary, "the prompts and the language model")
            return prompts.to(device)
        columns: dict[str, list[Any]] = {}
        if isinstance(prompts, str):
            texts: list[Any] = [prompts]
        elif hasattr(prompts, "column_names") or hasattr(prompts, "keys"):  # datasets; dict, pandas
            names = list(prompts.column_names if hasattr(prompts, "column_names") else prompts.keys())
            if "prompt" not in names:
                raise ValueError(f"a dataset of prompts needs the column 'prompt'; it has {names}")
            for name in names:
                if isinstance(prompts[name], str) or not isinstance(prompts[name], Iterable):
                    raise ValueError(f"column {name!r} is {prompts[name]!r}; give a list with one entry a prompt")
            texts = list(prompts["prompt"])
            columns = {name: list(prompts[name]) for name in names if name != "prompt"}
        elif isinstance(prompts, Iterable):
            texts = list(prompts)
        else:
            raise ValueError(f"prompts={prompts!r}; give a list of strings or of chats, or a dataset")
        for name, column in columns.items():
            if len(column) != len(texts):
                raise ValueError(f"column {name!r} has {len(column)} rows, the column 'prompt' has {len(texts)}")
        rows, ids_of = [], {}  # equal texts are encoded once
        for i, text in enumerate(texts):
            if isinstance(text, str):
                if text not in ids_of:
                    ids_of[text] = vocabulary.encode(text)
                rows.append(ids_of[text])
            elif isinstance(text, Sequence) and text and all(isinstance(m, Mapping) for m in text):
                rows.append(vocabulary.encode_chat(text))
            else:
                raise ValueError(f"prompt {i} is {text!r}; give a string or a list of chat messages")
        return cls.from_ids(rows, vocabulary, texts=texts, columns=columns, device=device)

    @classmethod
    def from_ids(
        cls,
        rows: Sequence[Sequence[int]],
        vocabulary: Vocabulary,
        texts: list[Any] | None = None,
        columns: dict[str, list[Any]] | None = None,
        device: torch.device | str = "cpu",
    ) -> "Prompts":
        """From token ids, one list a prompt, none of them empty; each is its own context, BOS included if wanted."""
        if any(len(row) == 0 for row in rows):
            raise ValueError("a prompt has no tokens; give at least one, for example the BOS token")
        for i, row in enumerate(rows):
            if not 0 <= min(row) <= max(row) < vocabulary.size:
                raise ValueError(
                    f"prompt {i} has token ids {list(row)}; the language model has 0..{vocabulary.size - 1}"
                )
        width = max((len(row) for row in rows), default=1)
        ids = torch.tensor([[vocabulary.pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        if texts is None:
            texts = [vocabulary.tokenizer.decode(list(row), skip_special_tokens=True) for row in rows]
        return cls(ids.view(-1, width).to(device), lengths.to(device), texts, vocabulary, columns or {})

    @property
    def batch_shape(self) -> torch.Size:
        return self.lengths.shape

    def __len__(self) -> int:
        return self.batch_shape[0]

    @property
    def names(self) -> list[str]:
        """What each prompt is called in tables and in ArviZ, flat: its text, or the messages of a chat; " (2)" and so on is
        added to those that are called like an earlier one."""
        return distinct(map(readable, self.texts))

    def unpadded(self) -> list[tuple[int, ...]]:
        """The token ids of each prompt, flat."""
        rows = zip(self.ids.flatten(0, -2).tolist(), self.lengths.flatten().tolist(), strict=True)
        return [tuple(row[len(row) - n :]) for row, n in rows]

    def identities(self) -> list[tuple[Any, ...]]:
        """What tells prompts apart, flat: token ids and further columns."""
        columns = [repr({name: c[i] for name, c in self.columns.items()}) for i in range(len(self.texts))]
        return [(ids, columns[i] if self.columns else "") for i, ids in enumerate(self.unpadded())]

    @property
    def mask(self) -> Bool[Tensor, "*S P"]:
        width = self.ids.shape[-1]
        return torch.arange(width, device=self.ids.device) >= width - self.lengths.unsqueeze(-1)

    def to(self, device: torch.device | str) -> "Prompts":
        return replace(self, ids=self.ids.to(device), lengths=self.lengths.to(device))

    def decode(self, x: Int[Tensor, "N T"]) -> list[str]:
        return self.vocabulary.decode(x)

    def completion_ids(self, x: Int[Tensor, "N T"]) -> list[list[int]]:
        return self.vocabulary.completion_ids(x)

    def flatten(self) -> "Prompts":
        """The same prompts with batch shape (N,)."""
        return self.reshape(torch.Size((prod(self.batch_shape),)))

    def take(self, rows: Int[Tensor, "N"]) -> "Prompts":
        """Prompts `rows` of the flattened batch, repeated or reordered as asked; surplus padding is cut off."""
        flat, index = self.flatten(), rows.tolist()
        lengths = flat.lengths[rows]
        width = int(lengths.max()) if len(index) else 1
        return replace(
            flat,
            ids=flat.ids[rows][:, flat.ids.shape[1] - width :],
            lengths=lengths,
            texts=[self.texts[i] for i in index],
            columns={name: [column[i] for i in index] for name, column in self.columns.items()},
        )

    def __getitem__(self, index: Any) -> "Prompts":
        """Prompts at a slice, a list or a tensor of positions along the first dimension, for subsampled plates."""
        grid = torch.arange(prod(self.batch_shape), device=self.ids.device).reshape(self.batch_shape)
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
        rows = grid[[int(index)] if single else index]
        taken = self.take(rows.reshape(-1))
        return taken.reshape(rows.shape)

    def reshape(self, shape: torch.Size) -> "Prompts":
        """The same prompts with another batch shape."""
        return replace(self, ids=self.ids.reshape(*shape, self.ids.shape[-1]), lengths=self.lengths.reshape(shape))

    def append(self, x: Int[Tensor, "*S T"], suffix: str = "") -> "Prompts":
        """Prompts followed by the completions `x` (without their end tokens) and `suffix`; batch shape (*S,).

        Lets a second text be prompted by a first: `answer ~ lm(prompts.append(rationale))`."""
        shape = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        grid = torch.arange(prod(self.batch_shape), device=self.ids.device).reshape(self.batch_shape)
        base = self.take(grid.expand(shape).reshape(-1))
        tail = self.vocabulary.plain(suffix) if suffix else []
        completions = x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1])
        heads = [row[row.shape[0] - n :].tolist() for row, n in zip(base.ids, base.lengths.tolist(), strict=True)]
        ends = set(self.vocabulary.end_ids)
        rows = [
            head + [i for i in ids if i not in ends] + tail
            for head, ids in zip(heads, self.completion_ids(completions), strict=True)
        ]
        texts = [
            (t if isinstance(t, str) else "") + c + suffix
            for t, c in zip(base.texts, self.decode(completions), strict=True)
        ]
        longer = Prompts.from_ids(rows, self.vocabulary, texts=texts, columns=base.columns, device=self.ids.device)
        longer = longer.reshape(shape)
        return replace(longer, ids=track_provenance(longer.ids, get_provenance(x) | get_provenance(self.ids)))


def batches(prompts: Prompts, batch_size: int, seed: int = 0) -> Iterator[Prompts]:
    """Endless mini-batches of prompts, a fresh shuffle each epoch; every prompt once an epoch."""
    for rows in shuffled(len(prompts), batch_size, seed):
        yield prompts[rows]


def shuffled(total: int, size: int, seed: int = 0) -> Iterator[Int[Tensor, "size"]]:
    """Endless batches of row numbers below `total`, each row once an epoch. Draws from a generator of its own: the
    global random state is left alone."""
    if not 1 <= size <= total:
        raise ValueError(f"batch_size={size}; give 1 to {total}, the number of prompts")
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        if len(order) < size:  # the rest of an epoch is carried over, so that no prompt is left out
            order = torch.cat([order, torch.randperm(total, generator=generator)])
        rows, order = order[:size], order[size:]
        yield rows
