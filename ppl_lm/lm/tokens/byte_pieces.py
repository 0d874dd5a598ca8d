"""What each token writes, as bytes: the step from a pattern over text to one over tokens."""

from collections.abc import Callable
from typing import Any

from ppl_lm.lm.vocabulary import Vocabulary


def token_bytes(vocabulary: Vocabulary) -> dict[int, bytes]:
    """Token id -> the bytes that it appends to a text, at least one. Special tokens, the ends among them, are left out.

    A character may be split between tokens, so bytes and not strings. Pieces are read as those of a byte-level BPE (GPT-2,
    Llama 3), of SentencePiece (`▁` is a space and `<0xE9>` a byte), or as they stand, whichever agrees with the tokenizer's
    own `decode` on every token. SentencePiece's decoder drops the space at the very start of a text, after the empty prompt;
    here it counts.

    :raises ValueError: if none agrees: then what a token writes depends on its neighbours, or cannot be known."""
    tokenizer: Any = vocabulary.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *vocabulary.end_ids, vocabulary.pad_id, vocabulary.bos_id}
    special |= {i for i, token in added.items() if token.special}
    named = {i: piece for piece, i in tokenizer.get_vocab().items() if 0 <= i < vocabulary.size and i not in special}
    pieces = dict(sorted(named.items()))
    anchor = next((i for i, piece in pieces.items() if len(piece) == 1 and piece.isascii() and piece.isalpha()), None)
    if anchor is None:
        raise ValueError(
            f"none of this tokenizer's {len(pieces)} text tokens is a single letter, so its pieces cannot be read with "
            "confidence; build the automaton over tokens, with Automaton.graph"
        )
    pairs = [[anchor, i] for i in pieces]  # by itself a token may lose the space in front
    written = tokenizer.batch_decode(pairs, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    unlike: list[str] = []
    for read in (byte_level, sentencepiece, str.encode):
        read_as = {i: added[i].content.encode() if i in added else _read(read, piece) for i, piece in pieces.items()}
        expected = [pieces[anchor] + read_as[i].decode(errors="replace") for i in pieces]
        wrong = next((n for n, text in enumerate(written) if text != expected[n]), None)
        if wrong is None:
            return {i: in_bytes for i, in_bytes in read_as.items() if in_bytes}
        unlike.append(f"{pairs[wrong]} is {written[wrong]!r}, not {expected[wrong]!r}")
    raise ValueError(
        "this tokenizer's text is not its tokens' bytes one after another: read as byte-level BPE, as SentencePiece and as "
        f"plain pieces, {'; '.join(unlike)}. Build the automaton over tokens, with Automaton.graph"
    )


def byte_level(piece: str) -> bytes:
    """GPT-2's alphabet: a printable character for each byte."""
    return bytes(BYTES[character] for character in piece)


def sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _read(read: Callable[[str], bytes], piece: str) -> bytes:
    """Nothing where a piece is not of this kind; the comparison with `decode` then tells."""
    try:
        return read(piece)
    except (KeyError, ValueError):
        return b""


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
