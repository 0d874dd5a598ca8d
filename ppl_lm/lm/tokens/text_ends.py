"""`TextEnds`: where a text ends: its length, its mask and its canonical form, from end tokens and never from pad."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class TextEnds:
    """Of texts as token ids: a text ends with its first end token, or after T tokens without one.

    A `Vocabulary` is one.

    :param size: V, ids are below it.
    :param end_ids: the ids that end a text.
    :param pad_id: what fills a text after its end; may equal an end id."""

    size: int
    end_ids: tuple[int, ...]
    pad_id: int

    def is_end(self, x: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
        """True where a token is an end token."""
        found = torch.zeros_like(x, dtype=torch.bool)
        for token in self.end_ids:  # not `isin`, for which the ids would be sent to the device each time
            found = found | (x == token)
        return found

    def lengths(self, x: Int[Tensor, "*S T"]) -> Int[Tensor, "*S"]:
        """Tokens of each completion, its end token included; T where no end token occurs."""
        end = self.is_end(x)
        first = end.to(torch.uint8).argmax(-1)  # index of the first end token, 0 if there is none
        return torch.where(end.any(-1), first + 1, x.shape[-1])

    def alive(self, x: Int[Tensor, "*S T"]) -> Bool[Tensor, "*S T"]:
        """True at the tokens that are part of a completion, its end token included."""
        return torch.arange(x.shape[-1], device=x.device) < self.lengths(x).unsqueeze(-1)

    def is_canonical(self, x: Int[Tensor, "*S T"]) -> Bool[Tensor, "*S"]:
        """Ids in range, and pad at every position after the first end token."""
        return (((x >= 0) & (x < self.size)) & (self.alive(x) | (x == self.pad_id))).all(-1)

    def completion_ids(self, x: Int[Tensor, "N T"]) -> list[list[int]]:
        """Rows cut after their end token: N lists."""
        rows, lengths = x.tolist(), self.lengths(x).tolist()
        return [row[:n] for row, n in zip(rows, lengths, strict=True)]
