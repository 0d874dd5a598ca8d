"""Conditional SMC: a population that grows around a given text. An upper bound of log Z, and a Markov kernel."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl_lm.infer.draws import Draws, concatenate
from ppl_lm.infer.importance import ROWS
from ppl_lm.infer.mcmc import Kernel, Propose, only_text
from ppl_lm.infer.resampling import Rule, systematic
from ppl_lm.infer.smc import Settings, check, finish, grow, laws
from ppl_lm.infer.twist import Twist
from ppl_lm.lm import meter
from ppl_lm.lm.decoder import invert


@torch.no_grad()
def conditional_smc(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    planted: Draws,
    *,
    num_samples: int = 256,
    twist: Twist | None = None,
    candidates: int | None = None,
    expand: int = 1,
    resample: Rule = systematic,
    threshold: float = 0.5,
    max_plate_nesting: int = 1,
) -> Draws:
    """For each planted draw a run of `smc` with these settings, one of whose texts is that draw and survives every resampling
    (Andrieu, Doucet & Holenstein 2010).

    Around exact posterior draws E[1/Ẑ] = 1/Z, Ẑ being a run's mean weight: so E[log Ẑ] is an upper bound of log Z, as that of
    `smc` is a lower one (Zhao et al. 2024, prop. 5.1). `log_evidence(smc(...), conditional_smc(...))` gives both.

    :param planted: draws of the model's posterior, (C, S, B), say `rejection`'s: C·S runs. If they are not exact, neither is
        the bound; `planted` of the result tells.
    :param num_samples: texts in each run, the planted one among them; the rest as for `smc`.
    :raises ValueError: if the planted draws hold another latent site than one text, or the proposal cannot draw one of them.
    """
    settings = Settings(twist, candidates, expand, resample, threshold)
    check(settings, guide, num_samples, 1)
    (name,) = only_text(planted)
    prompts = planted.prompts
    x = planted.latents[name].flatten(0, 1)  # (S, B, T)
    with meter.measure() as cost:
        prior, proposal = laws(model, guide, prompts)
        size = max(1, ROWS // (num_samples * expand * len(prompts)))
        parts = []
        possible = (planted.log_weight.flatten(0, 1) > -torch.inf).expand(len(x), len(prompts))
        for part, known in zip(x.split(size), possible.split(size), strict=True):
            held = torch.where(
                known.unsqueeze(-1), part, -1
            )  # an impossible text, which a chain may begin at, is not held
            grown = grow(prior, proposal, settings, num_samples, len(part), held.flatten(0, 1))
            assert grown.slot is not None
            lost = grown.log_w.gather(0, grown.slot.unsqueeze(0))[0] == -torch.inf
            if bool((lost & known.flatten()).any()):
                raise ValueError("the twist finds a text impossible that was planted as the posterior's")
            parts.append(finish(model, prompts, grown, len(prompts), max_plate_nesting))
    return replace(concatenate(parts, dim=0), cost=cost, planted=planted.exact)


def particle_gibbs(num_particles: int = 16, **settings: Any) -> Kernel:
    """A kernel for `mcmc`: conditional SMC around the chain's text, then one of the particles in proportion to its weight.
    Always accepted; leaves the posterior invariant for any number of particles, at least 2 (Andrieu et al. 2010).

    :param settings: of `conditional_smc`: twist, candidates, expand, resample, threshold."""

    if num_particles < 2:
        raise ValueError(f"num_particles={num_particles}; give at least 2")

    def kernel(model: Callable[..., Any], guide: Any, prompts: Any, max_plate_nesting: int = 1) -> Propose:
        def propose(state: Draws) -> tuple[Draws, Tensor]:
            made = conditional_smc(
                model, guide, state, num_samples=num_particles, max_plate_nesting=max_plate_nesting, **settings
            )  # (N, K, B)
            chains, _, batch = made.log_guide.shape
            log_w = made.log_weight.transpose(1, 2).flatten(0, 1)  # (N·B, K)
            lost = (log_w == -torch.inf).all(-1, keepdim=True)  # the chain has met no possible text: any will do
            flat = torch.where(lost, 0.0, log_w).log_softmax(-1)
            u = torch.rand(len(flat), dtype=torch.float64, device=flat.device)
            pick = invert(flat, u).reshape(chains, batch)
            chain = torch.arange(chains, device=pick.device).unsqueeze(-1)
            column = torch.arange(batch, device=pick.device)
            chosen = made.map(lambda v: v[chain, pick, column].unsqueeze(0))
            chosen = replace(chosen, interacting=False, planted=False, stats={})
            return chosen, state.log_weight[0] - chosen.log_weight[0]

        return propose

    return kernel
