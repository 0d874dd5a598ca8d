"""Conditional SMC: a population that grows around a given text. An upper bound of log Z, and a Markov kernel."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ppl_lm.infer.draws import Draws, concatenate
from ppl_lm.infer.samplers.importance_sampling import only_text, require_support
from ppl_lm.infer.samplers.population import grow
from ppl_lm.infer.samplers.sequential import PLAIN, finish, laws, require_counts
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.traces.layout import ROWS
from ppl_lm.infer.traces.sites import lacks_support
from ppl_lm.infer.traces.structure import nesting_of
from ppl_lm.lm import meter


@torch.no_grad()
def conditional_smc(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    planted: Draws,
    *,
    num_samples: int = 256,
    settings: SMCSettings = PLAIN,
    max_plate_nesting: int | None = None,
) -> Draws:
    """For each planted draw a run of `smc` with these settings, one of whose texts is that draw and survives every resampling
    (Andrieu, Doucet & Holenstein 2010).

    Around exact posterior draws E[1/Ẑ] = 1/Z, Ẑ being a run's mean weight: so E[log Ẑ] is an upper bound of log Z, as that of
    `smc` is a lower one (Zhao et al. 2024, prop. 5.1). `log_evidence(smc(...), conditional_smc(...))` gives both.

    :param planted: exact draws of the model's posterior, (C, S, B), say `rejection`'s: C·S runs.
    :param num_samples: texts in each run, the planted one among them; the rest as for `smc`.
    :raises ValueError: if the planted draws are not exact or hold another latent site than one text, or the proposal cannot
        draw one of them.
    """
    if planted.kind != "exact":
        raise ValueError(
            f"planted= must hold exact posterior draws (rejection), and these are {planted.kind}: around others a run's mean "
            "weight is no bound; particle_gibbs() moves draws that are not exact"
        )
    nesting = nesting_of(max_plate_nesting, model, guide, planted.prompts)
    return grow_around(planted, model, guide, settings, num_samples, nesting)


def grow_around(
    planted: Draws,
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    settings: SMCSettings,
    num_samples: int,
    nesting: int,
) -> Draws:
    """`conditional_smc` around any draws, also impossible ones, as a chain may begin at."""
    require_counts(num_samples, 1)
    settings.require_fits(guide)
    if settings.checker is not None:
        raise ValueError(
            "a checker's weights are random, and around a planted text they would have another law; leave checker= out, or use "
            "smc() or adaptive_rejection()"
        )
    if settings.moves:
        raise ValueError("a planted text has to stay, and moves would change it; leave moves= out, or use smc()")
    (name,) = only_text(planted)
    prompts = planted.prompts
    x = planted.latents[name].flatten(0, 1)  # (S, B, T)
    with meter.measure() as cost:
        prior, proposal = laws(model, guide, prompts)
        whole = proposal is None or not lacks_support(proposal, prior)
        require_support(whole, "conditional SMC holds texts of the whole posterior")
        size = max(1, ROWS // (num_samples * settings.expand * len(prompts)))
        parts = []
        possible = (planted.log_weight.flatten(0, 1) > -torch.inf).expand(len(x), len(prompts))
        for part, known in zip(x.split(size), possible.split(size), strict=True):
            # an impossible text, which a chain may begin at, is not held
            held = torch.where(known.unsqueeze(-1), part, -1)
            population, history = grow(prior, proposal, settings, num_samples, len(part), held.flatten(0, 1))
            assert population.slot is not None
            lost = population.log_w.gather(0, population.slot.unsqueeze(0))[0] == -torch.inf
            if bool((lost & known.flatten()).any()):
                raise ValueError("the twist finds a text impossible that was planted as the posterior's")
            parts.append(finish(model, prompts, population, history, len(prompts), nesting))
    return replace(concatenate(parts, dim=0), cost=cost, kind="conditional_runs")
