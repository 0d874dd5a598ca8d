"""`DeadPrefixes`: beginnings of texts that lead nowhere, with how probable they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Node:
    """A text begun as s. `log_p`: log-probability of its last token after those before, nats; `is_dead`: s is in B itself;
    `lost`: p0(B | s)."""

    log_p: float = 0.0
    parent: "Node | None" = None
    children: "dict[int, Node]" = field(default_factory=dict)
    is_dead: bool = False
    lost: float = 0.0


class DeadPrefixes:
    """A set B of texts begun, of which no text of the posterior begins so, as a trie over tokens.

    With p0(B | s) the prior's probability of a text in B once it has begun as s: 1 if s is in B itself, else
    Σ_v p0(v | s) p0(B | sv), over those next tokens v of which something is known. Where all next tokens are dead, so is s.

    :param size: of the vocabulary."""

    def __init__(self, size: int) -> None:
        self.root, self.size = Node(), size

    @property
    def probability(self) -> float:
        """p0(B)."""
        return self.root.lost

    def add(self, tokens: Sequence[int], log_p: Sequence[float]) -> None:
        """A beginning, and the prior's log-probability of each of its tokens after those before, nats."""
        node = self.root
        for token, nats in zip(tokens, log_p, strict=True):
            if node.is_dead:
                return
            node = node.children.setdefault(token, Node(nats, node))
        while not node.is_dead:
            more, node.lost, node.is_dead = 1.0 - node.lost, 1.0, True
            node.children.clear()
            above = node
            while above.parent is not None:
                more *= math.exp(above.log_p)
                above = above.parent
                above.lost = min(1.0, above.lost + more)
            if node.parent is None:
                return
            node = node.parent
            if len(node.children) < self.size or not all(child.is_dead for child in node.children.values()):
                return
