"""A tokenizer together with the facts that scoring needs: its end tokens, its pad, and how ids become text."""

import hashlib
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ppl_lm.embedded import FOLDER
from ppl_lm.lm.checking.adapter_folders import adapter_base, is_adapter_folder, tokenizer_folder
from ppl_lm.lm.tokens.chats import encode_chat, special_tokens
from ppl_lm.lm.tokens.text_ends import TextEnds


class Vocabulary(TextEnds):
    """Token ids are the value, text is a view of them (never the other way round).

    :param tokenizer: a Hugging Face tokenizer.
    :param size: number of token ids that the language model scores, V.
    :param end_ids: the ids that end a text; all of them stop it, and the one that occurs is scored. Given
        texts (`completion`) end with the first.
    :param pad_id: what fills a text after its end. May equal an end id: masks come from lengths, never from ids.
    """

    def __init__(self, tokenizer: Any, size: int, end_ids: Iterable[int], pad_id: int, bos_id: int | None):
        self.tokenizer = tokenizer
        self.size = size
        self.end_ids = tuple(dict.fromkeys(end_ids))
        self.pad_id = pad_id
        self.bos_id = bos_id
        for name, ids in {"end_ids": self.end_ids, "pad_id": (pad_id,)}.items():
            if any(not 0 <= i < size for i in ids):
                raise ValueError(f"{name}={ids} do not fit a vocabulary of {size} tokens; give ids in 0..{size - 1}")

    @classmethod
    def of(
        cls, tokenizer: Any, config: Any, generation_config: Any = None, end_ids: Iterable[int] | None = None
    ) -> "Vocabulary":
        """Of a language model with this configuration.

        :param end_ids: None: every one that the tokenizer or the configurations name, the tokenizer's first.
        :raises ValueError: if no end token is named."""
        sources = [getattr(source, "eos_token_id", None) for source in (tokenizer, generation_config, config)]
        named = [
            int(i) for ids in sources if ids is not None for i in (ids if isinstance(ids, (list, tuple)) else [ids])
        ]
        ends = named if end_ids is None else list(end_ids)
        if not ends:
            raise ValueError("no end token: neither the model nor its tokenizer names one; pass end_ids=[...]")
        config = text_config(config)
        pads = [getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None), *sorted(ends), 0]
        bos = [getattr(tokenizer, "bos_token_id", None), getattr(config, "bos_token_id", None)]
        pad, *_ = (i for i in pads if i is not None and 0 <= i < config.vocab_size)
        first = next((i for i in bos if i is not None and 0 <= i < config.vocab_size), None)
        return cls(tokenizer, size=config.vocab_size, end_ids=ends, pad_id=pad, bos_id=first)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path = FOLDER) -> "Vocabulary":
        """That of a language model in a folder or on the hub, whose weights are not read; of an adapter that of its base."""
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(name_or_folder))
        while is_adapter_folder(Path(name_or_folder)):
            name_or_folder = adapter_base(Path(name_or_folder))
        config = AutoConfig.from_pretrained(name_or_folder)
        try:
            generation: Any = GenerationConfig.from_pretrained(name_or_folder)
        except OSError:  # not every model has one
            generation = None
        return cls.of(tokenizer, config, generation)

    def decode(self, x: Int[Tensor, "N T"]) -> list[str]:
        """Text of each completion by itself, without special tokens: N strings. `Prompts.decode` gives it as it stands after
        its prompt: where the tokens write a space first, some tokenizers (SentencePiece) drop it at the start of a text."""
        return self.texts(self.completion_ids(x))

    def texts(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """What these tokens write, without special tokens, whatever the tokenizer's file says of cleaning spaces up. The one
        decoder; equal rows are decoded once."""
        keys = [tuple(row) for row in rows]
        distinct = list(dict.fromkeys(keys))
        if not distinct:
            return []
        texts = self.tokenizer.batch_decode(
            list(map(list, distinct)), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        text_of = dict(zip(distinct, texts, strict=True))
        return [text_of[key] for key in keys]

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt. Text that looks like a special token is plain text; the empty prompt is the BOS token."""
        inner = self.plain(text)
        ids = list(self.tokenizer(text, split_special_tokens=True)["input_ids"])
        # Some tokenizers close every text; a prompt is still open, whatever it ends with itself.
        added = len(ids) - len(inner)
        before = next((n for n in range(added + 1) if ids[n : n + len(inner)] == inner), added)
        ids = ids[: before + len(inner)]
        if ids:
            return ids
        if self.bos_id is None:
            raise ValueError(f"prompt {text!r} has no tokens and this tokenizer has no BOS token; give a longer prompt")
        return [self.bos_id]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        """Ids of a chat, as `apply_chat_template` renders it up to the assistant's turn; but control tokens that its texts
        spell out are plain text.

        :param arguments: `tools`, `documents`, `chat_template_kwargs`; see `ppl_lm.lm.tokens.chats.encode_chat`."""
        return encode_chat(self.tokenizer, messages, **arguments)

    def warn_of_control_tokens(self, texts: Iterable[str], what: str) -> None:
        """Warns if a text that is encoded as plain text spells a control token."""
        tokens = sorted(set(special_tokens(self.tokenizer).values()) - {""})
        spelled = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        for text in texts:
            if found := spelled.search(text):
                warnings.warn(
                    f"{what} {reprlib.repr(text)} spells the control token {found[0]!r}, which is encoded as plain text. If a "
                    "chat template made it, give the chat's messages instead, or its tokens: Prompts.from_ids",
                    stacklevel=4,
                )
                return

    def plain(self, text: str) -> list[int]:
        """Ids of a text, nothing added; what looks like a special token is plain text."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def completion(self, text: str, length: int, what: str) -> list[int]:
        """Ids of a text with its end token and padding, `length` in all; without an end token where it has as many itself.

        :param what: names it in messages.
        :raises ValueError: if it has no such ids."""
        if not isinstance(text, str):
            raise ValueError(f"{what} is {text!r}; give a string")
        ids = self.plain(text)
        if not ids:
            raise ValueError(f"{what} is empty: {text!r} has no tokens; give at least one, or the ids themselves")
        if len(ids) > length:
            raise ValueError(
                f"{what} has {len(ids)} tokens, {text[:60]!r}; completions here have at most {length}: raise max_new_tokens"
            )
        ended = [self.tokenizer.decode([i]) for i in ids if i in self.end_ids]
        if ended:
            raise ValueError(
                f"{what} holds the end token {ended[0]!r}, after which a completion has nothing: {text[:60]!r}"
            )
        row = [*ids, self.end_ids[0]][:length]
        row += [self.pad_id] * (length - len(row))
        (read,) = self.texts([ids])
        if read != text:
            raise ValueError(
                f"{what} cannot be encoded: {text[:60]!r} reads {read[:60]!r} in this tokenizer's tokens; give what they write"
            )
        return row

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two vocabularies exactly when the same ids mean the same tokens and the same ends."""
        table = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(repr((table, self.size, sorted(self.end_ids), self.pad_id)).encode()).hexdigest()

    def require_same(self, other: "Vocabulary", what: str) -> None:
        """Raises ValueError unless both share their tokens."""
        if self is not other and self.fingerprint != other.fingerprint:
            raise ValueError(
                f"{what} use different tokenizers ({self.size} and {other.size} tokens, end ids {self.end_ids} and "
                f"{other.end_ids}); their token ids do not mean the same text: build both from the same tokenizer"
            )


def text_config(config: Any) -> Any:
    """The part of a model's configuration that is about text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
