"""Between Pyro's layout of values, particles first and prompts last, and that of draws; and programs run at given values."""

import warnings
from collections.abc import Callable, Iterator
from itertools import dropwhile
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_lm.infer.traces.particles import Particles, as_particles, by_prompt
from ppl_lm.infer.traces.sites import Site, check_shape, is_density, is_record, log_density, log_shift, sample_sites
from ppl_lm.lm.prompts import Prompts

ROWS = 2048  # texts that one run of a program takes


def prompts_first(site: Site, nesting: int) -> Tensor:
    """A site's value, (n, *plates, B, *event) as Pyro has it, as (n, B, *plates, *event)."""
    value = site["value"].movedim(nesting, 1)
    used = {f.dim for f in site["cond_indep_stack"]}
    for dim in range(-nesting, -1):  # leftmost plate first
        if dim in used:
            break
        value = value.squeeze(2)
    return value


def require_all_prompts(particles: Particles) -> None:
    """Particles are draws of each prompt only then.

    :raises ValueError: if a plate subsamples, or lies where the prompts' does."""
    plate = particles.subsampled()
    if plate is not None:
        raise ValueError(f"plate {plate!r} subsamples: draws need all prompts at once; give fewer prompts instead")
    for name, site in particles.guide_sites.items():
        here = {frame.name for frame in site["cond_indep_stack"] if frame.dim == -1}
        if here and not here & particles.prompt_plates:
            raise ValueError(
                f"site {name!r} lies in the plate {next(iter(here))!r} at dim -1, which is the prompts'; draws need it at "
                "another dim, or as one site with .to_event(1)"
            )


def latent_values(particles: Particles) -> dict[str, Tensor]:
    """Of the guide's sites, (K, B, *inner, *event)."""
    return {name: prompts_first(site, particles.nesting) for name, site in particles.guide_sites.items()}


def observed_values(particles: Particles) -> dict[str, Tensor]:
    """Of the observed sites, without the dimension of the particles, which all observe the same."""

    def of_one(site: Site) -> Tensor:
        value, event_dim, nesting = site["value"].detach(), site["fn"].event_dim, particles.nesting
        value = value[0] if value.dim() > nesting + event_dim else value
        plates, event = value.shape[: value.dim() - event_dim], value.shape[value.dim() - event_dim :]
        sizes = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
        plates = [1] * (nesting - len(plates)) + list(plates)
        full = [sizes.get(d - nesting, 1) if size == 1 else size for d, size in enumerate(plates)]
        ordered = prompts_first({**site, "value": value.reshape(*plates, *event).expand(1, *full, *event)}, nesting)[0]
        return ordered if -1 in sizes else ordered.squeeze(0)

    return {name: of_one(site) for name, site in particles.observed_sites.items()}


def pointwise_log_likelihoods(particles: Particles) -> dict[str, Tensor]:
    """Of each observed site, for exp(r/β), at each index of its plates, float64, (K, B, *inner); B is the size of another plate
    of observations where they have one there, and 1 where they have none."""

    def at_each_index(name: str, site: Site) -> Tensor:
        term = (particles.log_p[name] + log_shift(site)).detach().double()
        term = term.reshape(*[1] * (particles.nesting + 1 - term.dim()), *term.shape)
        return prompts_first({**site, "value": term.expand(particles.count, *term.shape[1:])}, particles.nesting)

    return {name: at_each_index(name, site) for name, site in particles.observed_sites.items()}


def factors(particles: Particles) -> tuple[str, ...]:
    """Names of the observed sites whose likelihood is no normalised density."""
    return tuple(name for name, site in particles.observed_sites.items() if not is_density(site))


def plate_names(particles: Particles) -> dict[str, tuple[str | None, ...]]:
    """Of each site's dimensions after that of the draws, without those of its events: "prompt" for the prompts' plate; None
    of one that has no plate."""

    def of_one(site: Site) -> tuple[str | None, ...]:
        plates = {f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized}
        last = plates.get(-1)
        first = "prompt" if last in particles.prompt_plates else "prompt_plate" if last == "prompt" else last
        return first, *dropwhile(lambda name: name is None, (plates.get(dim) for dim in range(-particles.nesting, -1)))

    names = {name: of_one(site) for name, site in particles.guide_sites.items()}
    of_model = {name: of_one(site) for name, site in particles.model_sites.items()}
    for name, value in record_values(particles).items():
        of_model[name] = ("prompt" if value.shape[1] == len(particles.prompts) else None, *of_model[name][1:])
    alike = {name: plates for name, plates in of_model.items() if len(names.get(name, plates)) == len(plates)}
    return names | alike


def record_values(particles: Particles) -> dict[str, Tensor]:
    """What the model recorded, (K, B, *inner, *event) as float64, B being 1 for what all prompts share where they have but a
    joint weight. Left out, with a `UserWarning`, is what has the shape of neither the particles nor the prompts."""
    sites = {name: site for name, site in particles.model_sites.items() if is_record(site)}
    values = {name: _record(site, particles) for name, site in sites.items()}
    for name in (name for name, value in values.items() if value is None):
        warnings.warn(
            f"{name!r} records values of shape {tuple(sites[name]['value'].shape)}, which have neither the dimensions of "
            "particles and plates nor more on their right: they are left out of the draws",
            stacklevel=2,
        )
    return {name: value for name, value in values.items() if value is not None}


def _record(site: Site, particles: Particles) -> Tensor | None:
    value, nesting, event = site["value"].double(), particles.nesting, site["fn"].event_dim
    untold = event >= value.dim()
    if untold:  # all that plates do not account for
        event = max(0, value.dim() - nesting - 1)
    missing = nesting + 1 + event - value.dim()
    if missing < 0:
        return None
    value = value.reshape(*[1] * missing, *value.shape)  # (K, *plates, B, *event), with 1 for what is not there
    batch = len(particles.prompts)
    of_prompts = any(frame.vectorized and frame.dim == -1 for frame in site["cond_indep_stack"])
    sizes = (
        (batch,) if untold and event and of_prompts else (1, batch)
    )  # else a dimension too many may be taken for an event
    if value.shape[0] not in (1, particles.count) or value.shape[nesting] not in sizes:
        return None
    value = value.movedim(nesting, 1)  # (K, B, *plates, *event)
    used = {f.dim for f in site["cond_indep_stack"]}
    for dim in range(-nesting, -1):  # leftmost plate first
        if dim in used or value.shape[2] > 1:
            break
        value = value.squeeze(2)
    columns = batch if particles.is_local else value.shape[1]
    return value.expand(particles.count, columns, *value.shape[2:])


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


def sites_at(
    program: Callable[..., Any], latents: dict[str, Tensor], prompts: Prompts, nesting: int
) -> Iterator[tuple[int, dict[str, Site]]]:
    """Runs a program at given values of its latent sites, (S, B, *inner, *event), `ROWS` texts at a time: yields how many of
    the S rows each run takes, and its sites."""
    total = len(next(iter(latents.values())))
    size = max(1, ROWS // max(1, len(prompts)))
    for start in range(0, total, size):
        count = min(size, total - start)
        with Given({name: value[start : start + size] for name, value in latents.items()}, nesting):
            trace = poutine.trace(as_particles(program, count, nesting)).get_trace(prompts)
        yield count, sample_sites(trace)


def log_density_at(
    guide: Callable[..., Any], latents: dict[str, Tensor], prompts: Prompts, nesting: int, columns: int
) -> Float[Tensor, "S B"]:
    """log q(z | prompt) of given values, nats, float64, unscaled and unmasked.

    :param columns: B, or 1 where only the prompts' joint density exists.
    :raises ValueError: if the guide has other latent sites."""
    parts = []
    for count, sites in sites_at(guide, latents, prompts, nesting):
        latent = {name: site for name, site in sites.items() if not site["is_observed"]}
        if latent.keys() != latents.keys():
            raise ValueError(
                f"the guide has the sites {sorted(latent)}, the draws {sorted(latents)}: it cannot score them"
            )
        terms = [log_density(site) for site in latent.values()]
        for site, term in zip(latent.values(), terms, strict=True):
            check_shape(site, term, nesting + 1)
        parts.append(by_prompt(terms, count, columns))
    return torch.cat(parts)


def require_sound(particles: Particles) -> None:
    """:raises ValueError: as `require_all_prompts`, and if some evidence is infinitely likely."""
    require_all_prompts(particles)
    if bool((particles.log_likelihood() == torch.inf).any()):
        raise ValueError("the evidence has log-likelihood +inf after some text; give rewards that are finite or -inf")
