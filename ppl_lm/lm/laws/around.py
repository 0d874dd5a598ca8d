"""`Around`: a network around another one, whose logits it changes, each next token's for themselves."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ppl_lm.lm.experts import Caches, Experts, cuts_of
from ppl_lm.lm.network import Answer


class Around(Experts, ABC):
    """Drawing and scoring both pass here, so that they have one law."""

    def __init__(self, model: nn.Module):
        super().__init__([model])

    @property
    def model(self) -> nn.Module:
        """The network that it is around."""
        return self.models[0]

    @abstractmethod
    def law(self, logits: Float[Tensor, "N m V"]) -> Float[Tensor, "N m V"]:
        """What is answered where the network answers `logits`, of each next token."""

    @property
    def cuts(self) -> frozenset[int]:
        return cuts_of(self.model)

    def forward(self, past_key_values: Caches | None = None, logits_to_keep: int = 1, **inputs: Any) -> Answer:
        (logits,), moved = self.each(past_key_values, logits_to_keep=logits_to_keep, **inputs)
        return Answer(self.law(logits[:, -logits_to_keep:]), Caches(moved))
