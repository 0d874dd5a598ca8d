"""What tokens add to a text: a completion to its prompt, and one token after another to a completion."""

from collections.abc import Sequence
from itertools import islice
from os.path import commonprefix

import torch
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm.tokens.chats import special_tokens
from ppl_lm.lm.vocabulary import Vocabulary

Ids = tuple[int, ...]
HALF = "\N{REPLACEMENT CHARACTER}"  # of a character whose bytes are not all there
LONGEST = 4  # bytes of a character in UTF-8, each perhaps a token


def contexts(vocabulary: Vocabulary, prompts: Sequence[Sequence[int]]) -> list[Ids]:
    """The last tokens of each prompt, as many as it takes to know what further tokens add to its text: one, or up to four where
    they share a character; none where only special tokens precede, so that a text begins."""
    special = special_tokens(vocabulary.tokenizer)
    tails = [tuple(islice((i for i in reversed(ids) if i not in special), LONGEST))[::-1] for ids in prompts]
    known: dict[Ids, Ids] = {}
    for n in range(1, LONGEST + 1):
        unknown = [tail for tail in dict.fromkeys(tails) if tail not in known]
        texts = vocabulary.texts(tail[-n:] for tail in unknown)
        known |= {tail: tail[-n:] for tail, text in zip(unknown, texts, strict=True) if HALF not in text}
    return [known.get(tail, tail) for tail in tails]


def added(vocabulary: Vocabulary, before: Sequence[Ids], rows: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
    """The text that each row of tokens adds after its context, and before it what the context's text loses: half a character
    that is whole now, else nothing."""
    wholes = vocabulary.texts((*context, *row) for context, row in zip(before, rows, strict=True))
    alone = dict(zip(distinct := list(dict.fromkeys(before)), vocabulary.texts(distinct), strict=True))
    parts: list[tuple[str, str]] = []
    for context, whole in zip(before, wholes, strict=True):
        text = alone[context]
        kept = len(text) if whole.startswith(text) else len(commonprefix([text, whole]))
        parts.append((text[kept:], whole[kept:]))
    return parts


def going_on(vocabulary: Vocabulary, text: str) -> list[int]:
    """Ids that write just `text` after another text, where the tokenizer has such: SentencePiece puts a space in front of what
    it takes for a text of its own."""
    ids = vocabulary.plain(text)
    for anchor in ("a", "\n"):
        head, both = vocabulary.plain(anchor), vocabulary.plain(anchor + text)
        for tail in (ids, both[len(head) :]):
            if added(vocabulary, [tuple(head)], [tail]) == [("", text)]:
                return tail
    return ids


def pieces(vocabulary: Vocabulary, row: Int[Tensor, "T"], context: Ids = ()) -> list[str]:
    """What each token of one completion adds to its text, up to the end token. A character that several tokens write belongs to
    the last of them, and the others add ""; a special token is its name, as in ⟨end⟩."""
    (ids,) = vocabulary.completion_ids(row.unsqueeze(0))
    special = special_tokens(vocabulary.tokenizer)
    texts = [text for _, text in added(vocabulary, [context] * len(ids), [ids[: n + 1] for n in range(len(ids))])]
    last = max((n for n, i in enumerate(ids) if i not in special), default=-1)
    shown, done = [], 0
    for n, (token, text) in enumerate(zip(ids, texts, strict=True)):
        if token in special:
            shown.append(f"⟨{special[token].strip('<|>/')}⟩")
            continue
        known = len(text) if n == last else len(text.rstrip(HALF))  # the rest may yet be whole
        shown.append(text[done:known])
        done = max(done, known)
    return shown


def text_of(vocabulary: Vocabulary, prefix: Ids, context: Ids = ()) -> str:
    """What a prefix of a completion adds, without a character that is not whole yet."""
    if not prefix:
        return ""
    ids = vocabulary.completion_ids(torch.tensor([prefix], dtype=torch.int64))
    ((_, text),) = added(vocabulary, [context], ids)
    return text.rstrip(HALF)
