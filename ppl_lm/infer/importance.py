"""Importance sampling: a guide's draws, weighted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_lm.infer.draws import Draws, concatenate
from ppl_lm.infer.particles import Particles, as_particles, by_prompt, run
from ppl_lm.infer.sites import Site, is_sequence, log_density, sample_sites
from ppl_lm.lm import meter

ROWS = 2048  # texts drawn at a time


@torch.no_grad()
def importance(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    prompts: Any,
    *,
    num_samples: int = 1000,
    max_plate_nesting: int = 1,
) -> Draws:
    """`num_samples` draws of the guide for each prompt, with what is needed to weight them: importance sampling.

    The mean of `exp(draws.log_weight)` is an unbiased estimate of Z for each prompt.

    :param guide: None draws from the model's own prior.
    :raises ValueError: if `num_samples` is not positive, or a plate subsamples the prompts.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}; give at least 1")
    size = max(2, ROWS // max(1, len(prompts)))
    counts = [min(size, num_samples - done) for done in range(0, num_samples, size)]
    parts = []
    for n in counts:
        part = draw(model, guide, prompts, max(2, n), max_plate_nesting)  # a single particle would have no plate
        parts.append(part if n > 1 else part.map(lambda v: v[:, :1]))
    return concatenate(parts)


@torch.no_grad()
def score(guide: Callable[..., Any], draws: Draws, max_plate_nesting: int = 1) -> Draws:
    """The same draws with `log_guide` under another guide: how probable it finds them, nats."""
    flat = {name: value.flatten(0, 1) for name, value in draws.latents.items()}  # (C·S, B, ...)
    total = draws.num_samples
    size = max(1, ROWS // max(1, len(draws.prompts)))
    parts, costs = [], []
    for start in range(0, total, size):
        values = {name: value[start : start + size] for name, value in flat.items()}
        n = min(size, total - start)
        with meter.measure() as cost, Given(values, max_plate_nesting):
            sites = sample_sites(poutine.trace(as_particles(guide, n, max_plate_nesting)).get_trace(draws.prompts))
            sites = {name: site for name, site in sites.items() if not site["is_observed"]}
            if sites.keys() != flat.keys():
                raise ValueError(
                    f"the guide has the sites {sorted(sites)}, the draws {sorted(flat)}: it cannot score them"
                )
            log_q = [log_density(site) for site in sites.values()]
        parts.append(by_prompt(log_q, n, draws.log_guide.shape[-1]))
        costs.append(cost)
    log_guide = torch.cat(parts).reshape(draws.log_guide.shape)
    return replace(draws, log_guide=log_guide, cost=sum(costs, draws.cost))


def draw(model: Any, guide: Any, prompts: Any, n: int, nesting: int = 1) -> Draws:
    """n draws of the guide with their weights, in one run of guide and model; n is at least 2."""
    require_prompts(prompts)
    with meter.measure() as cost:
        p = run(model, guide, (prompts,), {}, n, nesting)
    return replace(as_draws(p, nesting), cost=cost)


def require_prompts(prompts: Any) -> None:
    if not len(prompts):
        raise ValueError("no prompt is given; give at least one, which may be empty: ['']")


def as_draws(p: Particles, nesting: int = 1) -> Draws:
    """Particles as one chain of draws.

    :raises ValueError: if a plate subsamples, or lies where the prompts' does."""
    n = p.count
    plate = p.subsampled()
    if plate is not None:
        raise ValueError(f"plate {plate!r} subsamples: draws need all prompts at once; give fewer prompts instead")
    size = len(p.prompts)
    for name, site in p.guide_sites.items():
        here = {f.name for f in site["cond_indep_stack"] if f.dim == -1}
        if here and not here & p.prompt_plates:
            raise ValueError(
                f"site {name!r} lies in the plate {next(iter(here))!r} at dim -1, which is the prompts'; draws need it at "
                "another dim, or as one site with .to_event(1)"
            )

    def record(v: Tensor) -> Tensor | None:  # (1, n, B), or None where it is not one number a text
        fits = v.dim() <= 2 and all(a in (1, b) for a, b in zip(v.shape[::-1], (size, n), strict=False))
        return v.double().expand(n, size).unsqueeze(0) if fits else None

    records = {k: record(v) for k, v in p.records.items()}
    return Draws(
        prompts=p.prompts,
        latents={k: prompts_first(s, nesting).unsqueeze(0) for k, s in p.guide_sites.items()},
        records={k: v for k, v in records.items() if v is not None},
        log_prior=p.log_prior().unsqueeze(0),
        log_likelihood=p.log_likelihood().unsqueeze(0),
        log_guide=p.log_drawn().unsqueeze(0),
        texts=tuple(k for k, s in p.guide_sites.items() if is_sequence(s)),
        observed={k: _of_one_particle(s, nesting) for k, s in p.observed_sites.items()},
        log_likelihoods={k: v.unsqueeze(0) for k, v in p.log_likelihoods().items()},
    )


def _of_one_particle(site: Site, nesting: int) -> Tensor:
    """An observed value without the dimension of the particles, which all observe the same."""
    value = site["value"].detach()
    return value[0] if value.dim() > nesting + site["fn"].event_dim else value


def prompts_first(site: Site, nesting: int) -> Tensor:
    """A site's value, (n, *plates, B, *event) as Pyro has it, as (n, B, *plates, *event)."""
    value = site["value"].movedim(nesting, 1)
    used = {f.dim for f in site["cond_indep_stack"]}
    for dim in range(-nesting, -1):  # leftmost plate first
        if dim in used:
            break
        value = value.squeeze(2)
    return value


class Given(Messenger):
    """Sites take the values that draws hold, in Pyro's layout: the way back from `prompts_first`."""

    def __init__(self, values: dict[str, Tensor], nesting: int):
        super().__init__()
        self.values, self.nesting = values, nesting

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["name"] not in self.values:
            return
        value = self.values[msg["name"]]
        missing = self.nesting + 1 - (value.dim() - msg["fn"].event_dim)
        value = value.reshape(*value.shape[:2], *[1] * missing, *value.shape[2:]).movedim(1, self.nesting)
        msg["value"], msg["done"] = (value if len(value) > 1 else value[0]), True
