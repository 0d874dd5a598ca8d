"""`Prompts`: what a language model is asked to continue, tokenised once and left-padded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Int
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from ppl_lm.lm.prompt_columns import as_columns, key_of, plain, require_unicode
from ppl_lm.lm.prompt_names import distinct, readable
from ppl_lm.lm.tokens.token_pieces import added, contexts, going_on
from ppl_lm.lm.vocabulary import Vocabulary

TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")


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
        """From one string, or strings or chats in anything that can be iterated over, or a table with the column `prompt`: a
        mapping, rows, a dataset, a frame of pandas, a table of pyarrow. See `as_columns`; it is read once.

        A string is plain text, also where it spells a control token: a warning says so. A chat is what
        `tokenizer.apply_chat_template` makes of it, but that texts which spell a control token are plain text; one that ends
        with an assistant message is continued (`continue_final_message`). The template is given the columns `tools`,
        `chat_template_kwargs` (a mapping) and `documents` (lists of mappings), each row its own.

        :raises ValueError: if a prompt is neither text nor a chat, or a column has another length; if a template fails, or its
            control tokens cannot be told from those of the texts; if a string has `tools` or `chat_template_kwargs`."""
        if isinstance(prompts, Prompts):
            vocabulary.require_same(prompts.vocabulary, "the prompts and the language model")
            return prompts.to(device)
        given, columns = as_columns(prompts)
        texts = [plain(text) for text in given]
        vocabulary.warn_of_control_tokens((text for text in texts if isinstance(text, str)), "prompt")
        rows: list[list[int]] = []
        ids_of: dict[Any, list[int]] = {}  # equal prompts are encoded once
        for i, text in enumerate(texts):
            require_unicode(text, f"prompt {i}")
            for_template = _for_template(columns, i)
            key = text if isinstance(text, str) and not for_template else (key_of(text), key_of(for_template))
            if key not in ids_of:
                ids_of[key] = _encoded(i, text, for_template, vocabulary)
            rows.append(ids_of[key])
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
            texts = vocabulary.texts(rows)
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
        columns = [key_of({name: c[i] for name, c in self.columns.items()}) for i in range(len(self.texts))]
        return list(zip(self.unpadded(), columns, strict=True))

    @property
    def mask(self) -> Bool[Tensor, "*S P"]:
        width = self.ids.shape[-1]
        return torch.arange(width, device=self.ids.device) >= width - self.lengths.unsqueeze(-1)

    def to(self, device: torch.device | str) -> "Prompts":
        return replace(self, ids=self.ids.to(device), lengths=self.lengths.to(device))

    def decode(self, x: Int[Tensor, "*#S T"]) -> list[str]:
        """The text that each completion adds to its prompt's, without special tokens, flat in row-major order.

        :param x: its leading dimensions broadcast against the prompts' batch shape."""
        try:
            shape = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        except RuntimeError as error:
            raise ValueError(
                f"x has the shape {tuple(x.shape)}, whose leading dimensions do not broadcast against prompts of shape "
                f"{tuple(self.batch_shape)}; give the completions of these prompts, (..., *S, T)"
            ) from error
        rows = self.completion_ids(x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1]))
        of_row = torch.arange(prod(self.batch_shape)).reshape(self.batch_shape).expand(shape).flatten().tolist()
        return [text for _, text in added(self.vocabulary, [self.contexts[b] for b in of_row], rows)]

    @cached_property
    def contexts(self) -> list[tuple[int, ...]]:
        """What of each prompt it takes to decode what follows it, flat; see `token_pieces.contexts`."""
        return contexts(self.vocabulary, self.unpadded())

    def completion_ids(self, x: Int[Tensor, "N T"]) -> list[list[int]]:
        return self.vocabulary.completion_ids(x)

    def flatten(self) -> "Prompts":
        """The same prompts with batch shape (N,)."""
        return self.reshape(torch.Size((prod(self.batch_shape),)))

    def take(self, rows: Int[Tensor, "*S"]) -> "Prompts":
        """Prompts `rows` of the flattened batch, repeated or reordered as asked, with the shape of `rows` as batch shape;
        surplus padding is cut off. So a latent site chooses what a text goes on from, particles and enumeration included:
        `z ~ Categorical; x ~ lm(topics.take(z))`.

        :raises ValueError: if `rows` are no whole numbers, or there is no such prompt."""
        if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            raise ValueError(f"rows={rows.dtype} numbers; take() needs whole ones, as of a Categorical: give z.long()")
        flat, index = self.flatten(), detach_provenance(rows)
        if bool(((index < 0) | (index >= len(flat.texts))).any()):
            raise ValueError(
                f"rows hold {int(index.min())} to {int(index.max())}; there are {len(flat.texts)} prompts, from 0"
            )
        index = index.to(self.ids.device)
        lengths, picks = flat.lengths[index], index.flatten().tolist()
        width = int(lengths.max()) if picks else 1
        ids = detach_provenance(flat.ids)[index][..., flat.ids.shape[1] - width :]
        return replace(
            flat,
            ids=track_provenance(ids, get_provenance(rows) | get_provenance(self.ids)),
            lengths=lengths,
            texts=[self.texts[i] for i in picks],
            columns={name: [column[i] for i in picks] for name, column in self.columns.items()},
        )

    def __getitem__(self, index: Any) -> "Prompts":
        """Prompts at a slice, a list or a tensor of positions along the first dimension, for subsampled plates."""
        grid = torch.arange(prod(self.batch_shape), device=self.ids.device).reshape(self.batch_shape)
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
        rows = grid[[int(index)] if single else index]
        return self.take(rows)

    def reshape(self, shape: torch.Size) -> "Prompts":
        """The same prompts with another batch shape."""
        return replace(self, ids=self.ids.reshape(*shape, self.ids.shape[-1]), lengths=self.lengths.reshape(shape))

    def append(self, x: Int[Tensor, "*S T"], suffix: str = "") -> "Prompts":
        """Prompts followed by the completions `x` (without their end tokens) and `suffix`; batch shape (*S,).

        Lets a second text be prompted by a first: `answer ~ lm(prompts.append(rationale))`."""
        shape = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        grid = torch.arange(prod(self.batch_shape), device=self.ids.device).reshape(self.batch_shape)
        base = self.take(grid.expand(shape).reshape(-1))
        self.vocabulary.warn_of_control_tokens([suffix], "suffix")
        tail = going_on(self.vocabulary, suffix) if suffix else []
        completions = x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1])
        ends = set(self.vocabulary.end_ids)
        ids = [[i for i in row if i not in ends] + tail for row in self.completion_ids(completions)]
        rows = [[*head, *row] for head, row in zip(base.unpadded(), ids, strict=True)]
        texts = [
            text.removesuffix(lost) + part if isinstance(text, str) else answered(text, lost, part)
            for text, (lost, part) in zip(base.texts, added(self.vocabulary, base.contexts, ids), strict=True)
        ]
        longer = Prompts.from_ids(rows, self.vocabulary, texts=texts, columns=base.columns, device=self.ids.device)
        longer = longer.reshape(shape)
        return replace(longer, ids=track_provenance(longer.ids, get_provenance(x) | get_provenance(self.ids)))


def answered(chat: Sequence[Mapping[str, Any]], lost: str, part: str) -> list[Any]:
    """A chat that goes on with a part of the assistant's answer, which replaces what is `lost` at its end."""
    last = chat[-1]
    if last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return [*chat[:-1], {**last, "content": last["content"].removesuffix(lost) + part}]
    return [*chat, {"role": "assistant", "content": part}]


def _encoded(i: int, text: Any, given: dict[str, Any], vocabulary: Vocabulary) -> list[int]:
    """Ids of prompt i, and what its row gives the chat template."""
    if isinstance(text, str):
        if for_chats := {*given} - {"documents"}:  # which a reward may read
            raise ValueError(
                f"prompt {i} is a string, which no chat template is applied to, but has {sorted(for_chats)} for one; give chat "
                "messages, or leave the column out"
            )
        return vocabulary.encode(text)
    if not (isinstance(text, Sequence) and text and all(isinstance(m, Mapping) for m in text)):
        raise ValueError(f"prompt {i} is {text!r}; give a string or a list of chat messages")
    try:
        return vocabulary.encode_chat(text, **given)
    except ValueError as error:
        raise ValueError(f"prompt {i}: {error}") from error


def _for_template(columns: Mapping[str, list[Any]], i: int) -> dict[str, Any]:
    """What row i gives a chat template; a column `documents` that is no list of mappings is the reward's alone."""
    given = {name: plain(columns[name][i]) for name in TEMPLATE_COLUMNS if name in columns}
    documents = given.get("documents")
    if not (isinstance(documents, (list, tuple)) and all(isinstance(d, Mapping) for d in documents)):
        given.pop("documents", None)
    return {name: value for name, value in given.items() if value is not None and value != {} and value != []}


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
