"""Moves within SMC: each text of a population changes its end, and the intermediate target stays invariant."""

from dataclasses import replace

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ppl_lm.infer.samplers.chances import accepted, places
from ppl_lm.infer.samplers.next_tokens import Laws, ask, choose
from ppl_lm.infer.samplers.population_state import Population
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.samplers.twist import PriorPower
from ppl_lm.lm.token_sequence import TokenSequence


def rejuvenate(state: Population, prior: TokenSequence, settings: SMCSettings, known: int) -> Population:
    """`settings.moves` Metropolis-Hastings steps of each text of which at most `known` tokens are written, ended ones included.

    A place uniform among the n tokens of a text s; what stands from there on is drawn anew by the prior, up to `known` tokens;
    accepted with min(1, ψ(s') / ψ(s) · n / n'), which leaves p0(s) ψ(s) invariant, so that weights stay as they are. Where ψ is
    random, that of the new text is asked once and stays with it (Andrieu & Roberts 2009)."""
    for _ in range(settings.moves):
        state = _moved(state, prior, settings, known)
    return state


def _moved(state: Population, prior: TokenSequence, settings: SMCSettings, known: int) -> Population:
    count, populations = state.live.shape
    vocabulary = prior.lm.vocabulary
    x, token_log_p = state.x.flatten(0, 1), state.token_log_p.flatten(0, 1)
    log_target, log_w = state.log_target.flatten(), state.log_w.flatten()
    column = torch.arange(populations, device=x.device).expand(count, populations).flatten()
    n = vocabulary.lengths(x[:, :known])
    place = places(n)
    new, new_log_p, log_psi = _drawn_anew(prior, settings, x, place, column, known)
    n_new = vocabulary.lengths(new[:, :known])
    log_p0 = new_log_p.sum(-1)
    if isinstance(settings.twist, PriorPower):
        log_psi = settings.twist.log_psi(log_p0)
    elif callable(settings.twist) and log_psi is None:
        log_psi = ask(settings.twist, prior.prompts.take(column % len(prior.prompts)), new, n_new)
    assert log_psi is not None
    target = torch.where(log_psi == -torch.inf, -torch.inf, log_p0 + log_psi)
    log_ratio = log_acceptance(log_target - token_log_p.sum(-1), log_psi, n, n_new)
    sound = log_w > -torch.inf  # a text without weight stays where it is
    taken = accepted(torch.where(sound, log_ratio, -torch.inf)) & sound

    def chosen(theirs: Tensor, ours: Tensor) -> Tensor:
        pick = taken.reshape(-1, *[1] * (ours.dim() - 1))
        return torch.where(pick, theirs, ours).unflatten(0, (count, populations))

    ended = vocabulary.is_end(new[:, :known]).any(-1) | (known == x.shape[-1])
    return replace(
        state,
        x=chosen(new, x),
        token_log_p=chosen(new_log_p, token_log_p),
        log_target=chosen(target, log_target),
        live=chosen(~ended, state.live.flatten()),
    )


def _drawn_anew(
    prior: TokenSequence,
    settings: SMCSettings,
    x: Int[Tensor, "N T"],
    place: Int[Tensor, "N"],
    column: Int[Tensor, "N"],
    known: int,
) -> tuple[Int[Tensor, "N T"], Float64[Tensor, "N T"], Float64[Tensor, "N"] | None]:
    """Texts that agree with x before `place` and go on as the prior's up to `known` tokens, log p0 of their tokens, and where
    the twist is a network its log ψ of each."""
    laws = Laws(prior, None, settings, column % len(prior.prompts))
    vocabulary = prior.lm.vocabulary
    new = torch.full_like(x, vocabulary.pad_id)
    log_p0 = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    log_psi = None if laws.log_psi() is None else torch.zeros(len(x), dtype=torch.float64, device=x.device)
    live = torch.arange(len(x), device=x.device)
    for t in range(known):
        log_p = laws.prior.log_probs()
        fresh = place[live] <= t
        tokens = x[live, t]
        if bool(fresh.any()):
            tokens = tokens.masked_scatter(fresh, choose(log_p[fresh], column[live[fresh]], 1)[:, 0])
        here = tokens.unsqueeze(-1)
        new[live, t], log_p0[live, t] = tokens, log_p.gather(-1, here)[:, 0].double()
        said = laws.log_psi()
        if said is not None and log_psi is not None:
            log_psi[live] = said.gather(-1, here)[:, 0].double()
        on = (~vocabulary.is_end(tokens)).nonzero()[:, 0]
        if t == known - 1 or not len(on):
            break
        laws.advance(on, tokens[on])
        live = live[on]
    return new, log_p0, log_psi


def log_acceptance(
    log_psi: Float64[Tensor, "N"], new: Float64[Tensor, "N"], n: Int[Tensor, "N"], n_new: Int[Tensor, "N"]
) -> Float64[Tensor, "N"]:
    """log [ψ(s') / ψ(s) · n / n'], nats: a longer text has more places, so its shorter one is drawn from it less often."""
    return new - log_psi + n.double().log() - n_new.double().log()
