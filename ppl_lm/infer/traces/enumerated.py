"""A program run at every value of its latent sites at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Shaped
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.traces.sites import Site, is_record, log_shift, sample_sites

MAX_CELLS = 20_000_000


@dataclass(frozen=True)
class EnumeratedSites:
    """Sites of a program at all N values of its latent sites, for each of B prompts. Log-probabilities are float64, nats.

    :param latents: site name -> (N, B, *event); `records` likewise, what the model recorded.
    :param log_joint: log p of all sites, (N, B), for exp(r/β); `log_q`: of the latent sites under the guide, or None."""

    latents: dict[str, Tensor]
    records: dict[str, Tensor]
    log_joint: Float[Tensor, "N B"]
    log_q: Float[Tensor, "N B"] | None


def enumerate_sites(model: Callable[..., Any], guide: Callable[..., Any] | None, prompts: Any) -> EnumeratedSites:
    """Runs the model over every value of its latent sites, and the guide at the same values.

    :raises ValueError: if a latent site cannot be enumerated, a site lies elsewhere than in the prompt plate alone, or there
        are too many values."""
    prompts = read_once(prompts, model, guide)
    marked = config_enumerate(model, default="parallel", expand=False)
    trace = poutine.trace(poutine.enum(marked, first_available_dim=-2)).get_trace(prompts)
    sites = sample_sites(trace)
    latents = {name: site for name, site in sites.items() if not site["is_observed"]}
    for name, site in latents.items():
        if not site["infer"].get("_enumerate_dim"):
            raise ValueError(f"site {name!r} ({type(site['fn']).__name__}) cannot be enumerated exactly")
    for name, site in sites.items():
        if not is_record(site) and {f.dim for f in site["cond_indep_stack"]} != {-1}:
            raise ValueError(
                f"site {name!r} lies outside the prompt plate, or in one inside it; enumerate_posterior() needs every site "
                "in the prompt plate alone"
            )
    batch = len(prompts)
    dims = {name: site["infer"]["_enumerate_dim"] for name, site in latents.items()}
    sizes = {dim: latents[name]["value"].shape[dim - latents[name]["fn"].event_dim] for name, dim in dims.items()}
    log_p = [_log_prob(site, sizes) for site in sites.values() if not is_record(site)]
    shape = torch.broadcast_shapes(*(term.shape for term in log_p), (batch,))
    if shape.numel() > MAX_CELLS:
        raise ValueError(f"{shape.numel():,} values are too many to enumerate (at most {MAX_CELLS:,})")

    def table(terms: list[Tensor]) -> Float64[Tensor, "N B"]:
        return sum(term.double().expand(shape) for term in terms).reshape(-1, batch)  # pyright: ignore

    def values(site: Site) -> Shaped[Tensor, "N B *E"]:
        value, event = site["value"], site["fn"].event_dim
        if (
            is_record(site) and event == value.dim()
        ):  # Pyro was not told: all that enumeration and the plate do not account for
            event = max(0, value.dim() - len(shape))
        event_shape = value.shape[value.dim() - event :]
        return value.expand(*shape, *event_shape).reshape(-1, batch, *event_shape)

    log_q = None
    if guide is not None:
        replayed = sample_sites(poutine.trace(poutine.replay(guide, trace=trace)).get_trace(prompts))
        log_q = table([_log_prob(site, sizes) for name, site in replayed.items() if name in latents])
    return EnumeratedSites(
        latents={name: values(site) for name, site in latents.items()},
        records={name: values(site) for name, site in sites.items() if is_record(site)},
        log_joint=table(log_p),
        log_q=log_q,
    )


def _log_prob(site: Site, sizes: dict[int, int]) -> Tensor:
    """Scaled and masked, for exp(r/β): what a bounded `Optimality` subtracts is added again.

    :param sizes: how many values the latent site has that is enumerated along a dimension.
    :raises ValueError: if there is another dimension, along which values would be paired with each other."""
    log_p = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    log_p = scale_and_mask(log_p, site["scale"], site["mask"]) + log_shift(site)
    for dim in range(-log_p.dim(), -1):
        if log_p.shape[dim] not in (1, sizes.get(dim, 1)):
            raise ValueError(
                f"site {site['name']!r} has log-probabilities of shape {tuple(log_p.shape)}, and no latent site is enumerated "
                f"along the dimension {dim}: values have met crosswise that belong together. Latent values have dimensions of "
                "their own left of the prompts' plate; let them broadcast, and count dimensions from the right"
            )
    return log_p
