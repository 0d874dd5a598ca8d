"""`automaton_graph`: a constraint's states as a networkx graph."""

import unicodedata
from string import ascii_lowercase, ascii_uppercase, digits

import networkx

from ppl_lm.likelihood.automata import Automaton
from ppl_lm.lm.tokens.byte_pieces import token_bytes
from ppl_lm.lm.tokens.token_pieces import text_of


def automaton_graph(automaton: Automaton) -> networkx.DiGraph:
    """The states of a constraint and what leads from one to the next.

    Nodes are the states, 0 the start; they have `start`, `accepting` (a text may end here) and `left` (tokens to the nearest
    such state). Each can be reached, and from each an accepting one can. Edges have `tokens` (ids) and `label`, printable.

    A token of several bytes that only takes a short cut, to where its bytes as tokens of their own lead too, is left out:
    over a byte-level vocabulary that leaves the automaton over bytes, of which all the others follow."""
    vocabulary, nowhere = automaton.vocabulary, len(automaton.accepting) - 1
    try:
        pieces = token_bytes(vocabulary)
    except ValueError:  # what a token writes depends on its neighbours
        pieces = {}
    single = {piece: token for token, piece in pieces.items() if len(piece) == 1}
    by_byte = {piece: automaton.to[:, token].tolist() for piece, token in single.items()}  # byte -> state -> next state

    def spelled(state: int, piece: bytes) -> int:
        for i in range(len(piece)):
            state = by_byte[piece[i : i + 1]][state] if piece[i : i + 1] in by_byte else nowhere
        return state

    graph = networkx.DiGraph()
    for state in range(nowhere):
        ends = bool(automaton.accepting[state])
        graph.add_node(state, start=state == 0, accepting=ends, left=int(automaton.left[state]))
    for state in range(nowhere):
        edges: dict[int, list[int]] = {}
        row = automaton.to[state]
        for token in (row < nowhere).nonzero().flatten().tolist():
            following, piece = int(row[token]), pieces.get(token, b"")
            if len(piece) < 2 or spelled(state, piece) != following:
                edges.setdefault(following, []).append(token)
        for following, tokens in edges.items():
            written = [pieces.get(t) or text_of(vocabulary, (t,)).encode() or f"token {t}".encode() for t in tokens]
            graph.add_edge(state, following, tokens=tokens, label=label(written))
    return graph


def label(pieces: list[bytes], most: int = 6) -> str:
    """Pieces of text as a short line: runs of single characters as `a–z`, the others by name, all printable.

    >>> label([b"a", b"b", b"c", b"!", b" ", b"good"])
    'a–c, ␣, !, good'
    """
    alone = sorted({p[0] for p in pieces if len(p) == 1})
    longer = sorted({p for p in pieces if len(p) > 1}, key=lambda p: (len(p), p))
    shown: list[str] = []
    if len(alone) > 128:
        missing = _runs([b for b in range(256) if b not in alone])
        shown.append("any byte" + (f" but {' '.join(missing[:most])}{' …' * (len(missing) > most)}" if missing else ""))
    else:
        shown += _runs(alone)
    shown += ["".join(map(_name, p.decode(errors="backslashreplace"))) for p in longer]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _runs(values: list[int]) -> list[str]:
    """Bytes in words, those of one kind that follow each other as a range; letters first."""
    runs: list[list[int]] = []
    for b in values:
        if runs and b == runs[-1][-1] + 1 and _kind(b) == _kind(runs[-1][-1]):
            runs[-1].append(b)
        else:
            runs.append([b])
    runs = [part for run in runs for part in ([run] if len(run) > 2 else [[b] for b in run])]
    runs.sort(key=lambda run: (_kind(run[0]), run[0]))
    return [_byte(run[0]) if len(run) == 1 else f"{_byte(run[0])}–{_byte(run[-1])}" for run in runs]


def _kind(b: int) -> int:
    c = chr(b)
    return 0 if c in ascii_lowercase else 1 if c in ascii_uppercase else 2 if c in digits else 4 if b > 127 else 3


def _byte(b: int) -> str:
    return f"0x{b:02X}" if b > 127 else _name(chr(b))


def _name(c: str) -> str:
    """A character as what can be seen and cannot move anything; a comma in words, since commas separate."""
    if c == " ":
        return "␣"
    if c == ",":
        return "comma"
    return c if unicodedata.category(c)[0] not in "CZ" else repr(c)[1:-1] if ord(c) < 128 else f"U+{ord(c):04X}"
