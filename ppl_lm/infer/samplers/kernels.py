"""Kernels of Markov chains over text: what `mcmc` proposes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl_lm.infer.draws import Draws
from ppl_lm.infer.samplers.conditional import grow_around
from ppl_lm.infer.samplers.importance_sampling import draw, only_text
from ppl_lm.infer.samplers.sequential import PLAIN
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.traces.text_site import Resumed
from ppl_lm.lm.decoder import invert

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
        place = (torch.rand(before.shape, dtype=torch.float64, device=x.device) * before).long()
        plates = (len(x), *[1] * (max_plate_nesting - 1), *x.shape[1:])  # the program's, between particles and prompts
        with Resumed(name, x.reshape(plates), place.reshape(plates[:-1])):
            proposal = draw(model, guide, prompts, state.num_samples, max_plate_nesting)
        ratio = before.double().log() - vocabulary.lengths(proposal.latents[name][0]).double().log()
        return proposal, ratio if state.is_local else ratio.sum(-1, keepdim=True)

    return propose


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
