"""Kernels of Markov chains over text: what `mcmc` proposes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ppl_lm.infer.draws import Draws
from ppl_lm.infer.samplers.chances import either, places
from ppl_lm.infer.samplers.conditional import grow_around
from ppl_lm.infer.samplers.importance_sampling import draw, only_text
from ppl_lm.infer.samplers.sequential import PLAIN
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.traces.text_site import Resumed, text_law
from ppl_lm.lm.decoding.decoder import invert
from ppl_lm.lm.token_sequence import TokenSequence

Propose = Callable[[Draws], tuple[Draws, Tensor]]
"""From one draw a chain, (1, N, B), to another and log [back(x | x') q(x') / (forth(x' | x) q(x))], nats, (N, B): 0 for a
proposal that is a draw of the guide, whose density q the weights hold already."""
Kernel = Callable[[Callable[..., Any], Any, Any, int], Propose]


def independence(model: Callable[..., Any], guide: Any, prompts: Any, max_plate_nesting: int = 1) -> Propose:
    """A new draw of the guide, whatever the state is: α = min(1, w(z') / w(z)), w = p(z, evidence) / q(z) (Tierney 1994).

    Serves every model; all its latent sites move together."""

    def propose(state: Draws) -> tuple[Draws, Tensor]:
        proposal = draw(model, guide, prompts, state.num_samples, max_plate_nesting)
        return proposal, torch.zeros_like(proposal.log_guide[0])

    return propose


def suffix(model: Callable[..., Any], guide: Any, prompts: Any, max_plate_nesting: int = 1) -> Propose:
    """The text's end drawn anew by the guide, from a place uniform among its |x| tokens, the end token among them:

        α = min(1, w(x') / w(x) · |x| / |x'|)

    (Faria et al. 2024, QUEST, whose code scores by the mean over tokens and so leaves another law invariant). What stands
    before the place is in both texts, so the ratio of what the guide gives the two ends is that of the whole texts.

    Serves models and guides with one text a prompt and no other latent site."""

    def propose(state: Draws) -> tuple[Draws, Tensor]:
        vocabulary, (name,) = state.prompts.vocabulary, only_text(state)
        x = state.latents[name][0]  # (N, B, T)
        before = vocabulary.lengths(x)
        place = places(before)
        plates = (len(x), *[1] * (max_plate_nesting - 1), *x.shape[1:])  # the program's, between particles and prompts
        with Resumed(name, x.reshape(plates), place.reshape(plates[:-1])):
            proposal = draw(model, guide, prompts, state.num_samples, max_plate_nesting)
        ratio = before.double().log() - vocabulary.lengths(proposal.latents[name][0]).double().log()
        return proposal, ratio if state.is_local else ratio.sum(-1, keepdim=True)

    return propose


def substitution(model: Callable[..., Any], guide: Any, prompts: Any, max_plate_nesting: int = 1) -> Propose:
    """One token drawn anew by the guide q at its place, among those that end no text, and what follows it kept:

        α = min(1, w(x') / w(x) · q(x'_>t | x'_≤t) / q(x_>t | x_≤t))

    the place t uniform among the tokens that end no text. It moves texts whose ends are good as they are, as those of a rare
    event. It never changes how long a text is: chains need `mixed(suffix, substitution)`.

    Serves models and guides with one text a prompt and no other latent site."""
    law = text_law(model if guide is None else guide, prompts)

    def propose(state: Draws) -> tuple[Draws, Tensor]:
        vocabulary, (name,) = state.prompts.vocabulary, only_text(state)
        x = state.latents[name][0]  # (N, B, T)
        free = vocabulary.lengths(x) - vocabulary.is_end(x).any(-1).long()  # tokens that end no text
        place = places(free)
        log_q = next_at(law, x, place)  # (N, B, V)
        log_q[..., torch.tensor(vocabulary.end_ids, device=x.device)] = -torch.inf
        here = place.unsqueeze(-1)
        old, some = x.gather(-1, here), free > 0
        u = torch.rand(free.shape, dtype=torch.float64, device=x.device)
        new = old.squeeze(-1).masked_scatter(some, invert(log_q[some], u[some])).unsqueeze(-1)
        plates = (len(x), *[1] * (max_plate_nesting - 1), *x.shape[1:])
        changed = x.scatter(-1, here, new)
        with Resumed(name, changed.reshape(plates), vocabulary.lengths(changed).reshape(plates[:-1])):
            proposal = draw(model, guide, prompts, state.num_samples, max_plate_nesting)
        forth = torch.where(some, (log_q.gather(-1, new) - log_q.gather(-1, old)).squeeze(-1), 0.0)
        forth = forth if state.is_local else forth.sum(-1, keepdim=True)
        correction = (proposal.log_guide - state.log_guide)[0] - forth
        lost = proposal.log_guide[0] == -torch.inf  # what follows is impossible after the new token: the state stays
        if bool(lost.any()):
            stay = either(replace(state, stats={}), replace(proposal, stats={}), ~lost)
            proposal, correction = replace(stay, cost=proposal.cost), torch.where(lost, 0.0, correction)
        return proposal, correction

    return propose


def next_at(law: TokenSequence, x: Int[Tensor, "N B T"], place: Int[Tensor, "N B"]) -> Float64[Tensor, "N B V"]:
    """log q of every token at one place of each text, given what stands before it."""
    flat, at = x.flatten(0, 1), place.flatten()
    batch = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]).flatten()
    parts = []
    for rows in torch.arange(len(flat), device=x.device).split(
        law.lm.rows_per_pass(law.prompts.ids.shape[-1], x.shape[-1])
    ):
        log_q = law.lm.next_token_log_probs(law.prompts.take(batch[rows]), flat[rows])  # (rows, U, V)
        parts.append(log_q[torch.arange(len(rows), device=x.device), at[rows].clamp_max(log_q.shape[1] - 1)].double())
    return torch.cat(parts).unflatten(0, x.shape[:2])


def mixed(*kernels: Kernel) -> Kernel:
    """At each step one of these kernels, as likely one as another, for all chains the same: it leaves invariant what each does.

    :raises ValueError: if none is given, or particle Gibbs among others."""
    if not kernels:
        raise ValueError("mixed() of no kernel; give some, such as mixed(suffix, substitution)")
    if len(kernels) > 1 and any(getattr(one, "asks_evidence", False) for one in kernels):
        raise ValueError(
            "particle Gibbs cannot be mixed with other kernels: what it leaves of a text is the weight of its run, and no "
            "density of the guide, which they need; run mcmc with each by itself"
        )

    def kernel(model: Callable[..., Any], guide: Any, prompts: Any, max_plate_nesting: int = 1) -> Propose:
        each = [one(model, guide, prompts, max_plate_nesting) for one in kernels]
        return lambda state: each[int(torch.randint(len(each), ()))](state)

    kernel.asks_evidence = any(getattr(one, "asks_evidence", False) for one in kernels)  # pyright: ignore
    return kernel


ends_and_tokens = mixed(suffix, substitution)
"""`suffix` or `substitution`, by a coin at each step: reaches all texts, and moves those whose ends are good as they are."""


def particle_gibbs(num_particles: int = 16, settings: SMCSettings = PLAIN) -> Kernel:
    """A kernel for `mcmc`: conditional SMC around the chain's text, then one of the particles in proportion to its weight.
    Always accepted; leaves the posterior invariant for any number of particles, at least 2 (Andrieu et al. 2010).

    :param settings: as of `smc`."""

    if num_particles < 2:
        raise ValueError(f"num_particles={num_particles}; give at least 2")

    def kernel(model: Callable[..., Any], guide: Any, prompts: Any, max_plate_nesting: int = 1) -> Propose:
        def propose(state: Draws) -> tuple[Draws, Tensor]:
            runs = grow_around(state, model, guide, settings, num_particles, max_plate_nesting)  # (N, K, B)
            chains, _, batch = runs.log_guide.shape
            log_w = runs.log_weight.transpose(1, 2).flatten(0, 1)  # (N·B, K)
            lost = (log_w == -torch.inf).all(-1, keepdim=True)  # the chain has met no possible text: any will do
            flat = torch.where(lost, 0.0, log_w).log_softmax(-1)
            u = torch.rand(len(flat), dtype=torch.float64, device=flat.device)
            pick = invert(flat, u).reshape(chains, batch)
            chain = torch.arange(chains, device=pick.device).unsqueeze(-1)
            prompt = torch.arange(batch, device=pick.device)
            chosen = replace(runs, stats={}).map(lambda v: v[chain, pick, prompt].unsqueeze(0))
            chosen = replace(chosen, kind="weighted")
            return chosen, state.log_weight[0] - chosen.log_weight[0]

        return propose

    kernel.asks_evidence = True  # pyright: ignore[reportFunctionMemberAccess]
    return kernel


def require_blind(kernel: Kernel) -> None:
    """:raises ValueError: of a kernel whose proposals know the evidence, where it is tempered or left out."""
    if getattr(kernel, "asks_evidence", False):
        raise ValueError(
            "particle Gibbs moves by the model's evidence as it is, not tempered: give kernels.suffix or independence"
        )
