"""`TokenMask`: which next tokens an automaton allows, as a network that answers logits of 0 and -inf."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ppl_lm.lm.network import Answer


@dataclass
class States:
    """The cache: in which state each row's text is, after how many of its tokens. None before the prompt."""

    state: Int[Tensor, "N"] | None = None
    tokens: int = 0

    def batch_select_indices(self, rows: Int[Tensor, "M"]) -> None:
        assert self.state is not None
        self.state = self.state[rows]


class TokenMask(nn.Module):
    """Logits are 0 where a token is allowed and its text can still be finished within `max_new_tokens`, else -inf. After a
    text's end, or a token that was not allowed, all are 0.

    The states begin after the prompt, whose own tokens move nothing: it is what the first call holds in front of the
    `logits_to_keep` - 1 tokens of a text that is scored at once.

    :param to: the next state of each state and token; text begins in state 0, and the last state is where
        nothing is masked.
    :param needs: how many more tokens each state needs after each token until its text has ended.
    """

    networks = 0  # not counted as a language model's forward pass

    def __init__(self, to: Int[Tensor, "states V"], needs: Int[Tensor, "states V"], max_new_tokens: int):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=to.shape[1])
        self.max_new_tokens = max_new_tokens
        self.to_state: Tensor
        self.needs: Tensor
        self.register_buffer("to_state", to)
        self.register_buffer("needs", needs)

    def new_cache(self) -> States:
        return States()

    def forward(
        self,
        input_ids: Int[Tensor, "N L"],
        past_key_values: States | None = None,
        logits_to_keep: int = 1,
        **_: Any,
    ) -> Answer:
        keep, past = logits_to_keep, past_key_values or States()
        if past.state is None:
            state = input_ids.new_zeros(len(input_ids))
            text, visited = input_ids[:, input_ids.shape[1] - keep + 1 :], [state]
        else:
            state, text, visited = past.state, input_ids, []
        for position, token in enumerate(text.unbind(1), start=past.tokens):
            late = (
                self.needs[state, token] > self.max_new_tokens - 1 - position
            )  # not allowed: no text of ours from here
            state = torch.where(late, len(self.needs) - 1, self.to_state[state, token].long())
            visited.append(state)
        tokens = past.tokens + text.shape[1]
        position = torch.arange(tokens - keep + 1, tokens + 1, device=state.device)  # of each token that is asked for
        room = self.max_new_tokens - 1 - position  # tokens after it, (keep,)
        allowed = self.needs[torch.stack(visited[-keep:], 1)] <= room.unsqueeze(-1)  # (N, keep, V)
        logits = torch.zeros(allowed.shape, device=state.device).masked_fill(~allowed, -torch.inf)
        return Answer(logits, States(state, tokens))
