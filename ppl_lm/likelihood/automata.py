"""`Automaton`: hard structure, such as a regular expression, as a constraint over tokens."""

from collections.abc import Collection, Hashable, Mapping
from numbers import Integral
from typing import Any

import networkx
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ppl_lm.lm.automaton_mask import TokenMask
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.tokens.byte_pieces import token_bytes
from ppl_lm.lm.vocabulary import Vocabulary

NEVER = torch.iinfo(torch.int16).max  # tokens until an end that is out of reach
MAX_CELLS = 2**27  # of the table of states and tokens, six bytes each


class Automaton:
    """A set of whole texts: those *finished* ones whose tokens lead from the start to an accepting state.

    A text satisfies it if the tokens before its end token, whichever of the vocabulary's that is, lead to an accepting state.
    A *truncated* text (`max_new_tokens` tokens, no end) never does: what was cut off is no whole text. Tokens are the value
    and text is a view: where several token sequences write one text, a regular expression allows them all. It allows no
    special token.

    As evidence it is a constraint, `bind(constrained, prior, constraint=automaton)`. As a proposal it is a mask,
    `product([prior, automaton.mask(prior)])`: never a text that breaks it, but another law than the posterior, since each
    token is normalised by itself; the weights make up for that.

    :param moves: state -> token -> next state; see also `Automaton.regex` and `Automaton.graph`.
    :param start: the state of the empty text.
    :param ends: the accepting states.
    :raises ValueError: if no accepting state can be reached, or a token or a state is unknown.
    """

    r_max = 1.0  # of its answers, yes (1) or no (0)

    def __init__(
        self,
        moves: Mapping[Hashable, Mapping[int, Hashable]],
        start: Hashable,
        ends: Collection[Hashable],
        vocabulary: Vocabulary,
    ):
        self.vocabulary, size = vocabulary, vocabulary.size
        states = networkx.DiGraph()
        states.add_nodes_from(moves)
        states.add_edges_from((state, to) for state, row in moves.items() for to in set(row.values()))
        if unknown := [state for state in (start, *ends) if state not in states]:
            raise ValueError(f"{unknown[0]!r} is none of the automaton's {len(states)} states")
        if wrong := [i for i in set().union(*moves.values()) if not 0 <= i < size or i in vocabulary.end_ids]:
            raise ValueError(
                f"token {wrong[0]} is not one that a text goes on with: give ids in 0..{size - 1} other than the end tokens "
                f"{vocabulary.end_ids}; where a text may end is for the accepting states to say"
            )
        reached = networkx.descendants(states, start) | {start}
        accepting = reached.intersection(ends)
        left: dict[Hashable, float] = {}  # state -> tokens to an accepting one
        if accepting:
            left = networkx.multi_source_dijkstra_path_length(states.reverse(copy=False), accepting)
        if start not in left:
            raise ValueError(
                f"no text satisfies it: from the start {len(reached)} states can be reached over this vocabulary's tokens, but "
                f"none of the {len(set(ends))} accepting ones"
            )
        kept = [start, *(state for state in states if state in reached and state in left and state != start)]
        number = {state: n for n, state in enumerate(kept)}
        nowhere = len(kept)  # the state after the end, and after a token that is not allowed
        if nowhere * size > MAX_CELLS:
            raise ValueError(
                f"{nowhere:,} states of {size:,} tokens are too many (at most {MAX_CELLS // size:,} states fit): give a "
                "simpler pattern, above all smaller counts in {m,n}"
            )
        self.to = torch.full((nowhere + 1, size), nowhere, dtype=torch.int32)  # next state
        for state in kept:
            row = [(token, number[to]) for token, to in moves.get(state, {}).items() if to in number]
            if row:
                tokens, following = torch.tensor(row).T
                self.to[number[state], tokens] = following.int()
        self.accepting = torch.tensor([*(state in accepting for state in kept), False])
        self.left = torch.tensor([*(min(left[state], NEVER) for state in kept), NEVER], dtype=torch.int16)

    @classmethod
    def regex(cls, pattern: str, vocabulary: Vocabulary) -> "Automaton":
        """The texts that match `pattern` as a whole, as `re.fullmatch` would have it, in every way to write them in tokens.

        The text is the bytes that its tokens write one after another; where words begin with a space, so should the pattern:
        `" (good|bad)"`. The syntax is that of Rust's `regex` crate, without anchors, look-around and `\\b`. Seconds for most
        patterns; half a minute and 3 GB for `.{0,100}` over 50,000 tokens, since every state is tried with every token.

        :raises ImportError: if `outlines-core` is missing, which is in `pip install 'ppl_lm[grammar]'`.
        :raises ValueError: if the pattern is empty, cannot be read, or matches nothing that the tokens can write; or if it
            cannot be known what a token writes."""
        try:
            import outlines_core
        except ImportError as error:
            raise ImportError(
                "a regular expression needs outlines-core: pip install 'ppl_lm[grammar]'; Automaton.graph does not"
            ) from error
        if not pattern:
            raise ValueError("the pattern is empty; give the texts that are to be allowed, such as ' (yes|no)'")
        # Three additions, whose moves are taken out again. A last character of our own: outlines-core prefers one
        # alternative to another once it has matched (of a|ab it would keep a), and now none does before the text is over.
        # All single bytes: it refuses patterns of which a part needs what no token writes. And an end of its own. The pattern
        # by itself goes first, because a)|(b is none.
        size, last = vocabulary.size, "\U0010ffff"
        writes: dict[bytes, list[int]] = {bytes([byte]): [size + byte] for byte in range(256)}
        writes[last.encode()] = [size + 256]
        for token, piece in token_bytes(vocabulary).items():
            writes.setdefault(piece, []).append(token)
        try:
            outlines_core.Index(pattern, outlines_core.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
            index = outlines_core.Index(f"(?:{pattern}){last}", outlines_core.Vocabulary(size + 257, writes))
        except ValueError as error:
            raise ValueError(
                f"pattern={pattern!r} cannot be made an automaton: {error}. The whole text has to match, so leave anchors out; "
                "look-around, back-references and \\b are not regular, or not supported"
            ) from error
        finals, moves = set(index.get_final_states()), index.get_transitions()
        ends = [state for state, row in moves.items() if row.get(size + 256) in finals]
        moves = {state: {token: to for token, to in row.items() if token < size} for state, row in moves.items()}
        try:
            return cls(moves, index.get_initial_state(), ends, vocabulary)
        except ValueError as error:
            raise ValueError(f"pattern={pattern!r}: {error}") from error

    @classmethod
    def graph(
        cls,
        graph: networkx.DiGraph,
        start: Hashable,
        ends: Collection[Hashable],
        vocabulary: Vocabulary,
        attribute: str = "token",
    ) -> "Automaton":
        """The texts that are a walk through a networkx DiGraph or MultiDiGraph from `start` to one of `ends`.

        One token may lead to several nodes: then a text is allowed if one of its walks is.

        :param attribute: of an edge, which tokens it stands for: an id, a string that is one token, or a list of these.
        :raises ValueError: if a node or a token is unknown, an edge has none, or no walk leads to an end."""
        if unknown := [node for node in (start, *ends) if node not in graph]:
            raise ValueError(f"{unknown[0]!r} is none of the graph's {len(graph)} nodes")
        edges: dict[Hashable, list[tuple[int, Hashable]]] = {}
        for node, to, named in graph.edges(data=attribute):
            if named is None:
                raise ValueError(
                    f"the edge {node!r} -> {to!r} has no attribute {attribute!r}; give the tokens it stands for"
                )
            named = named if isinstance(named, (list, tuple, set, frozenset, range)) else [named]
            edges.setdefault(node, []).extend((_token_id(token, vocabulary), to) for token in named)
        first, moves = frozenset([start]), {}
        todo: list[frozenset[Hashable]] = [first]
        while todo:  # the subset construction: a state is all nodes where the walks so far may be
            if (state := todo.pop()) in moves:
                continue
            row: dict[int, set[Hashable]] = {}
            for token, to in (move for node in state for move in edges.get(node, [])):
                row.setdefault(token, set()).add(to)
            moves[state] = {token: frozenset(nodes) for token, nodes in row.items()}
            todo += moves[state].values()
        return cls(moves, first, [state for state in moves if not state.isdisjoint(ends)], vocabulary)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text that satisfies it, its end token included."""
        return int(self.left[0]) + 1

    def holds(self, x: Int[Tensor, "*S T"]) -> Bool[Tensor, "*S"]:
        """Whether each completion, int64 in canonical form, satisfies it."""
        to, accepting, end = self.to.to(x.device), self.accepting.to(x.device), self.vocabulary.is_end(x)
        state = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
        holds = torch.zeros_like(state, dtype=torch.bool)
        for t in range(x.shape[-1]):
            holds |= accepting[state] & end[..., t]  # once at most: an end token leads nowhere
            state = to[state, x[..., t]].long()
        return holds

    def __call__(self, completion_ids: list[list[int]], **_: object) -> list[float]:
        """1 for each completion that satisfies it, else 0: a constraint, in the signature of rewards."""
        groups: dict[int, list[int]] = {}  # by length, so that nothing is padded with what might be an end token
        for n, row in enumerate(completion_ids):
            groups.setdefault(len(row), []).append(n)
        values = [0.0] * len(completion_ids)
        for rows in groups.values():
            ids = torch.tensor([completion_ids[n] for n in rows], dtype=torch.int64)
            for n, holds in zip(rows, self.holds(ids).tolist(), strict=True):
                values[n] = float(holds)
        return values

    def mask(self, lm: LanguageModel) -> LanguageModel:
        """A network whose *logits* are 0 for the tokens that `lm`'s texts may go on with and -inf for the others: those
        that break it, and those after which no end is in reach of the tokens left of `max_new_tokens`.

        `product([lm, automaton.mask(lm)])` is local masking; as the twist of SMC it keeps the same texts. It costs no forward
        pass. What follows an end, or a text that breaks it already, is not masked.

        :raises ValueError: if not even the shortest text fits into `max_new_tokens`, or the vocabulary is another."""
        lm.vocabulary.require_same(self.vocabulary, "the automaton and the language model")
        if self.shortest > lm.max_new_tokens:
            raise ValueError(
                f"the shortest text that satisfies the automaton has {self.shortest} tokens, its end token included, but "
                f"max_new_tokens={lm.max_new_tokens}; raise max_new_tokens, or allow shorter texts"
            )
        needs = self.left[self.to].clamp_max(NEVER - 1) + 1  # (states, V), int16
        needs[:, list(self.vocabulary.end_ids)] = torch.where(self.accepting, 0, NEVER).short().unsqueeze(-1)
        needs[-1] = 0
        network = TokenMask(self.to, needs, lm.max_new_tokens)
        mask = LanguageModel(network, lm.vocabulary.tokenizer, lm.max_new_tokens, end_ids=lm.vocabulary.end_ids)
        mask.vocabulary = lm.vocabulary
        return mask.to(lm.device)


def _token_id(named: Any, vocabulary: Vocabulary) -> int:
    """A token given as an id or as text."""
    if isinstance(named, Integral):
        return int(named)
    if not isinstance(named, str):
        raise ValueError(f"an edge's token is {named!r}; give an id, or a string that is one token")
    ids = vocabulary.plain(named)
    if len(ids) != 1:
        raise ValueError(f"{named!r} is {len(ids)} tokens, {ids}; give one token an edge, as an id or as text")
    return ids[0]
