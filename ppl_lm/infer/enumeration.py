"""Exact inference by enumeration, for tiny vocabularies: the oracle that everything else is held against."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from torch import Tensor

from ppl_lm.infer.traces.sites import Site, is_record, sample_sites
from ppl_lm.likelihood.optimality import Optimality

MAX_CELLS = 20_000_000


@dataclass(frozen=True)
class EnumeratedPosterior:
    """A posterior as a table over all N values of its latent sites, for each of B prompts.

    All log-probabilities are float64, in nats, and differentiable in the weights of model and guide: the gradient of
    any objective is `torch.autograd.grad` of a formula in them.

    :param latents: site name -> (N, B, ...).
    :param log_joint: log p(z, evidence | prompt), (N, B); `log_q` likewise, under the guide, or None.
    :param records: what the model recorded, (N, B).
    """

    latents: dict[str, Tensor]
    records: dict[str, Tensor]
    log_joint: Tensor
    log_q: Tensor | None

    @property
    def log_z(self) -> Tensor:
        """log Σ_z p(z, evidence), (B,)."""
        return self.log_joint.logsumexp(0)

    @property
    def log_posterior(self) -> Tensor:
        return self.log_joint - self.log_z

    @property
    def kl_q_p(self) -> Tensor:
        """KL(q ‖ posterior), (B,)."""
        return kl(self._guide(), self.log_posterior)

    @property
    def kl_p_q(self) -> Tensor:
        """KL(posterior ‖ q), (B,)."""
        return kl(self.log_posterior, self._guide())

    @property
    def elbo(self) -> Tensor:
        """E_q[log p(z, evidence) - log q(z)] = log Z - KL(q ‖ posterior), (B,)."""
        return -kl(self._guide(), self.log_joint)

    def _guide(self) -> Tensor:
        if self.log_q is None:
            raise ValueError("this needs a guide: exact(model, guide, prompts)")
        return self.log_q


def enumerate_posterior(
    model: Callable[..., Any], guide: Callable[..., Any] | None, prompts: Any
) -> EnumeratedPosterior:
    """Runs the model over every value of its latent sites, and the guide at the same values.

    The latent sites must have finite supports (texts over tiny vocabularies, Categorical, Bernoulli). All sites must lie
    in the prompt plate and in no other.

    :raises ValueError: if a latent site cannot be enumerated, or there are too many values.
    """
    marked = config_enumerate(model, default="parallel", expand=False)
    trace = poutine.trace(poutine.enum(marked, first_available_dim=-2)).get_trace(prompts)
    sites = sample_sites(trace)
    latents = {n: s for n, s in sites.items() if not s["is_observed"]}
    for name, site in latents.items():
        if not site["infer"].get("_enumerate_dim"):
            raise ValueError(f"site {name!r} ({type(site['fn']).__name__}) cannot be enumerated exactly")
    for name, site in sites.items():
        if not is_record(site) and {f.dim for f in site["cond_indep_stack"]} != {-1}:
            raise ValueError(
                f"site {name!r} lies outside the prompt plate, or in one inside it; exact() needs every site in the prompt "
                "plate alone"
            )
    batch = len(prompts)
    log_p = [_log_prob(s) for s in sites.values() if not is_record(s)]
    shape = torch.broadcast_shapes(*(term.shape for term in log_p), (batch,))
    if shape.numel() > MAX_CELLS:
        raise ValueError(f"{shape.numel():,} values are too many to enumerate (at most {MAX_CELLS:,})")

    def table(terms: list[Tensor]) -> Tensor:
        return sum(term.double().expand(shape) for term in terms).reshape(-1, batch)  # pyright: ignore

    log_q = None
    if guide is not None:
        replayed = sample_sites(poutine.trace(poutine.replay(guide, trace=trace)).get_trace(prompts))
        terms = [s for n, s in replayed.items() if n in latents]
        log_q = table([_log_prob(s) for s in terms])

    def values(site: Any) -> Tensor:
        v, event = site["value"], len(site["fn"].event_shape)
        whole = v.expand(*shape, *v.shape[v.dim() - event :])
        return whole.reshape(-1, batch, *v.shape[v.dim() - event :])

    records = {n: s for n, s in sites.items() if is_record(s)}
    return EnumeratedPosterior(
        latents={n: values(s) for n, s in latents.items()},
        records={n: values(s) for n, s in records.items()},
        log_joint=table(log_p),
        log_q=log_q,
    )


def _log_prob(site: Site) -> Tensor:
    """Scaled and masked, for exp(r/β): what a bounded `Optimality` subtracts is added again."""
    fn = site["fn"]
    log_p = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    shift = (fn.log_bound or 0.0) if isinstance(fn, Optimality) else 0.0
    return scale_and_mask(log_p + shift, site["scale"], site["mask"])


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ_z a (log a - log b) over the first dimension, nats; a zero of `a` counts nothing."""
    return torch.where(log_a == -torch.inf, 0.0, log_a.exp() * (log_a - log_b)).sum(0)
