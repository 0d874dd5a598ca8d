"""Trials of adaptive rejection: texts drawn from the prior without the beginnings known to be dead, each left when it dies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from ppl_lm.infer.samplers.constraints.dead_prefixes import DeadPrefixes, Node
from ppl_lm.infer.samplers.next_tokens import choose
from ppl_lm.likelihood.checker import Checker
from ppl_lm.lm.decoding.decoder import Decoder
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.token_sequence import TokenSequence

SIBLINGS = 16  # of the likeliest tokens in the place of one that was not allowed, which are asked about too


@dataclass(frozen=True)
class Trials:
    """N texts as far as they came; what is after a text's end, or after the token by which it died, is padding.

    :param length: tokens of each, the last one included.
    :param token_log_p: log p0 of each token, nats, float64; 0 after the last.
    :param log_q: how probable the trial found its tokens, nats.
    :param allowed: whether the checker lets it be, as a whole text.
    :param dead: for each text that is not, beginnings that lead nowhere: tokens, and the log-probability of each."""

    x: Int[Tensor, "N T"]
    length: Int[Tensor, "N"]
    token_log_p: Float64[Tensor, "N T"]
    log_q: Float64[Tensor, "N"]
    allowed: Bool[Tensor, "N"]
    dead: list[list[tuple[list[int], list[float]]]]


def run_trials(law: TokenSequence, checker: Checker, known: Sequence[DeadPrefixes], rows: Int[Tensor, "N"]) -> Trials:
    """A trial for each entry of `rows`, of prompt `rows[i]`, by p0(x | x is not in B): the next token in proportion to
    p0(v | s) (1 - p0(B | sv)).

    :param known: B of each trial; nothing is added to it here."""
    vocabulary, steps, device = law.lm.vocabulary, law.event_shape[0], rows.device
    x = torch.full((len(rows), steps), vocabulary.pad_id, device=device)
    token_log_p = torch.zeros(len(rows), steps, dtype=torch.float64, device=device)
    log_q = torch.zeros(len(rows), dtype=torch.float64, device=device)
    length, allowed = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    dead: list[list[tuple[list[int], list[float]]]] = [[] for _ in range(len(rows))]
    at: list[Node | None] = [each.root for each in known]  # where each text is among the known ones
    live = torch.arange(len(rows), device=device)
    with law.lm.precision():
        decoder = Decoder.of(law.lm, law.prompts, rows)
        for t in range(steps):
            log_p = decoder.log_probs().double().log_softmax(-1)
            here = [at[i] for i in live.tolist()]
            left = _without(log_p, here)
            lost = ~(left.exp().sum(-1) > 0)  # whatever goes on from here is dead: so is what was written
            for j in lost.nonzero()[:, 0].tolist():
                i = int(live[j])
                dead[i] = [(x[i, :t].tolist(), token_log_p[i, :t].tolist())]
            token = choose(torch.where(lost.unsqueeze(-1), log_p, left), live, 1)[:, 0]
            drawn = left.log_softmax(-1).gather(-1, token.unsqueeze(-1))[:, 0]
            log_q[live] += torch.where(lost, 0.0, drawn)
            x[live, t], length[live] = token, t + 1
            token_log_p[live, t] = log_p.gather(-1, token.unsqueeze(-1))[:, 0]
            for i, v, node in zip(live.tolist(), token.tolist(), here, strict=True):
                at[i] = None if node is None else node.children.get(v)
            fine = checker.allows(law.prompts.take(rows[live]), x[live], length[live]) & ~lost
            whole = vocabulary.is_end(token) | (t == steps - 1)
            allowed[live] = fine & whole
            died = (~fine & ~lost).nonzero()[:, 0]
            prompts = law.prompts.take(rows[live[died]])
            for j, tokens in zip(
                died.tolist(), _dead_siblings(checker, prompts, x[live[died]], t, log_p[died]), strict=True
            ):
                i = int(live[j])
                before, nats = x[i, :t].tolist(), token_log_p[i, :t].tolist()
                dead[i] = [([*before, v], [*nats, float(log_p[j, v])]) for v in (int(token[j]), *tokens)]
            on = (fine & ~whole).nonzero()[:, 0]
            if not len(on):
                break
            if len(on) < len(live):
                decoder.reorder(on)
                live, token = live[on], token[on]
            decoder.advance(token)
    return Trials(x, length, token_log_p, log_q, allowed, dead)


def _dead_siblings(
    checker: Checker, prompts: Prompts, x: Int[Tensor, "n T"], t: int, log_p: Float64[Tensor, "n V"]
) -> list[list[int]]:
    """Of the likeliest tokens at position t in the place of each text's own, those that are not allowed there either."""
    if not len(x):
        return []
    tokens = log_p.topk(min(SIBLINGS, log_p.shape[-1])).indices  # (n, S)
    of = torch.arange(len(x), device=x.device).repeat_interleave(tokens.shape[-1])
    other = x[of]
    other[:, t] = tokens.flatten()
    fine = checker.allows(prompts.take(of), other, torch.full_like(of, t + 1)).reshape(tokens.shape)
    return [row[~kept].tolist() for row, kept in zip(tokens, fine, strict=True)]


def _without(log_p: Float64[Tensor, "n V"], at: list[Node | None]) -> Float64[Tensor, "n V"]:
    """log p0 with what is known to be lost after each token taken out, up to a constant of each row."""
    found = [(i, v, child.lost) for i, node in enumerate(at) if node for v, child in node.children.items()]
    if not found:
        return log_p
    row, token, lost = (list(column) for column in zip(*found, strict=True))
    shares = torch.tensor(lost, dtype=torch.float64, device=log_p.device)
    log_q = log_p.clone()
    log_q[row, token] += torch.log1p(-shares)
    return log_q
