"""What tokens add to their text, one by one: `pieces`, and `text_of` a prefix."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm.vocabulary import Vocabulary


def pieces(vocabulary: Vocabulary, row: Int[Tensor, "T"]) -> list[str]:
    """What each token of one completion adds to its text, up to the end token. A character that several tokens write belongs to
    the last of them, and the others add ""; a special token is its name, as in ⟨end⟩."""
    tokenizer: Any = vocabulary.tokenizer
    (ids,) = vocabulary.completion_ids(row.unsqueeze(0))
    special = set(tokenizer.all_special_ids)
    plain = [[i for i in ids[: n + 1] if i not in special] for n in range(len(ids))]
    texts = tokenizer.batch_decode(plain, clean_up_tokenization_spaces=False) if ids else []
    last = max((n for n, i in enumerate(ids) if i not in special), default=-1)
    shown, done = [], 0
    for n, (token, text) in enumerate(zip(ids, texts, strict=True)):
        if token in special:
            shown.append(f"⟨{tokenizer.convert_ids_to_tokens(token).strip('<|>/')}⟩")
            continue
        known = len(text) if n == last else len(text.rstrip("\N{REPLACEMENT CHARACTER}"))  # the rest may yet be whole
        shown.append(text[done:known])
        done = max(done, known)
    return shown


def text_of(vocabulary: Vocabulary, prefix: tuple[int, ...]) -> str:
    """Of a byte-level BPE, without the character that is not whole yet."""
    if not prefix:
        return ""
    (text,) = vocabulary.decode(torch.tensor([prefix], dtype=torch.int64))
    return text.rstrip("\ufffd")
