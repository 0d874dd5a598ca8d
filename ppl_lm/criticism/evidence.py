"""The evidence bracket: lower bound ≤ log Z ≤ upper bound, and with it how far a guide is from its posterior."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import EQUAL, TOGETHER, Draws
from ppl_lm.infer.log_weights import log_mean, mean, weighted_mean
from ppl_lm.infer.tables import as_html

MIN_MEANS = 30  # independent means of weights, below which their standard error cannot be trusted


@dataclass(frozen=True, repr=False)
class Evidence:
    """Bounds and estimates of log Z for each of B prompts, nats, float64, each with its standard error (`_se`).

    :param elbo: E_q[log w] = log Z - KL(q ‖ p), w = p(x, evidence)/q(x).
    :param iwae: E_q[log of the mean of `iwae_particles` weights]: a tighter lower bound (Burda et al. 2016). From few draws
        the mean is of fewer weights, so that there are 30 such means to take an error from.
    :param upper: EUBO = E_p[log w] = log Z + KL(p ‖ q), from posterior draws.
    :param iwae_upper: reverse IWAE, a tighter upper bound: E[log of the mean of `iwae_particles` weights], one of them a
        posterior draw's, the others the guide's (Grosse et al. 2015; Brekelmans et al. 2022).
    :param upper_exact: whether those draws were exact. If not they are the guide's own, reweighted, and both upper bounds
        are approximate: they cannot show posterior mass that the guide never visits.
    :param log_z: estimate of log Z: from the proposals behind the exact draws, else from the guide's draws.
    :param lacks_support: whether the guide's law is truncated. Its upper bounds and KL(p ‖ q) are infinite then, however few
        texts it cannot draw; and `log_z`, where it is from the guide's draws, is of the posterior on its support, and so
        is `kl_q_p` the distance from that: both are too small.
    :param prompts: by name, as long as B; "all prompts" where only their joint evidence exists.
    """

    elbo: Float[Tensor, "B"]
    elbo_se: Float[Tensor, "B"]
    iwae: Float[Tensor, "B"]
    iwae_se: Float[Tensor, "B"]
    iwae_particles: int
    upper: Float[Tensor, "B"]
    upper_se: Float[Tensor, "B"]
    iwae_upper: Float[Tensor, "B"]
    iwae_upper_se: Float[Tensor, "B"]
    upper_exact: bool
    log_z: Float[Tensor, "B"]
    log_z_se: Float[Tensor, "B"]
    kl_q_p: Float[Tensor, "B"]
    kl_q_p_se: Float[Tensor, "B"]
    kl_p_q: Float[Tensor, "B"]
    kl_p_q_se: Float[Tensor, "B"]
    prompts: tuple[str, ...] = ()
    lacks_support: bool = False

    def __repr__(self) -> str:
        lower, log_z, se, upper = (v.tolist() for v in (self.elbo, self.log_z, self.log_z_se, self.upper))
        sign = "≤" if self.upper_exact else "≲"
        rows = [
            f"{a:.3f} ≤ log Z {z:.3f} ± {e:.3f} {sign} {b:.3f}"
            for a, z, e, b in zip(lower, log_z, se, upper, strict=True)
        ]
        return f"Evidence({'; '.join(rows[:3])}{f'; … of {len(rows)} prompts' if len(rows) > 3 else ''} nats)"

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` with a row for each prompt and a column for each figure, nats."""
        import pandas as pd

        figures = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "prompts"}
        columns = {k: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for k, v in figures.items()}
        names = list(self.prompts) or list(range(len(self.log_z)))
        return pd.DataFrame(columns, index=pd.Index(names, name="prompt"))

    def _repr_html_(self) -> str:
        return as_html(self.to_dataframe(), "Evidence bracket, nats")

    def __str__(self) -> str:
        label = "≤" if self.upper_exact else "≲ (approximate)"
        of = "log Z"
        if self.lacks_support and not self.upper_exact:
            of = "log Z of the guide's truncated support"
        rows = zip(*(getattr(self, k).tolist() for k in ("elbo", "elbo_se", "iwae", "log_z", "log_z_se")), strict=True)
        tops = zip(self.iwae_upper.tolist(), self.upper.tolist(), self.upper_se.tolist(), strict=True)
        return "\n".join(
            f"ELBO {e:.3f} ± {ese:.3f} ≤ IWAE-{self.iwae_particles} {i:.3f} ≤ {of} {z:.3f} ± {zse:.3f} "
            f"{label} IWAE-{self.iwae_particles} upper {iu:.3f} {label} EUBO {u:.3f} ± {use:.3f} nats"
            for (e, ese, i, z, zse), (iu, u, use) in zip(rows, tops, strict=True)
        )


def log_evidence(draws: Draws, exact: Draws | None = None, iwae_particles: int = 64) -> Evidence:
    """Bounds of log Z from a guide's draws, and from exact posterior draws where there are some.

    :param draws: the guide's (`importance`).
    :param exact: exact posterior draws whose `log_guide` is that of the same guide: `rejection(...).under(guide)`. With
        `smc`'s draws, `conditional_smc`'s: each run counts as one draw, its weight being the run's Ẑ, so that the KLs are those
        of all that a run chooses at random, and above those of a text picked from it.
    :raises ValueError: if `exact` holds draws that are not exact, or `draws` holds exact ones or Markov chains.
    """
    if draws.kind in (*EQUAL, "rescored"):
        raise ValueError("draws= must be the guide's own draws; pass exact posterior draws as exact=")
    if draws.kind in TOGETHER or (exact is not None and exact.kind in TOGETHER):
        if draws.kind != "runs" or (exact is not None and exact.kind != "conditional_runs"):
            raise ValueError("smc's draws go with conditional_smc's of the same settings, and with no others")
        draws, exact = draws.by_run(), None if exact is None else exact.by_run()
    if exact is not None and exact.kind != "exact":
        raise ValueError(f"exact= must hold exact posterior draws (rejection); these are {exact.kind}")
    log_w = draws.log_weight.flatten(0, 1)  # (S, B)
    n = len(log_w)
    elbo, elbo_se = mean(log_w)
    require_count("iwae_particles", iwae_particles)
    groups = iwae_particles_of(n, iwae_particles)
    bound = log_w[: n // groups * groups].reshape(-1, groups, log_w.shape[1])
    iwae, iwae_se = mean(bound.logsumexp(1) - math.log(groups))
    log_z, log_z_se = log_mean(log_w)
    relative = (log_w - log_z).exp()
    kl_q_p, kl_q_p_se = log_z - elbo, (relative - log_w).std(0) / math.sqrt(n)  # one influence function: same draws
    kl_q_p_se = kl_q_p_se.nan_to_num(math.inf, math.inf)  # an ELBO of -inf is known to be nothing
    if exact is not None and exact.proposals is not None:
        # Bounded weights cannot miss mass; a guide's own can, with a small standard error (it never sees what it lacks).
        log_z, log_z_se = log_mean(exact.proposals.log_weight.flatten(0, 1))
        kl_q_p, kl_q_p_se = log_z - elbo, (log_z_se**2 + elbo_se**2).sqrt()
    iwae_upper, iwae_upper_se = _reverse_iwae(log_w, exact, groups)
    if exact is not None:
        upper, upper_se = mean(exact.log_weight.flatten(0, 1))
        kl_p_q_se = (upper_se**2 + log_z_se**2 - 2 * _covariance(exact, log_z)).clamp_min(0).sqrt()
    else:
        upper, upper_se = weighted_mean(log_w, log_w)
        share = log_w.softmax(0)
        terms = torch.where(share > 0, log_w, 0.0)
        kl_p_q_se = (share * (terms - upper - 1) + 1 / n).square().sum(0).sqrt()  # influence of upper less log Z's
    kl_p_q = upper - log_z
    if draws.proposals is not None:  # quasi-rejection: its law is normalised by an estimate from the same proposals
        log_z, log_z_se = log_mean(draws.proposals.log_weight.flatten(0, 1))
        kl_q_p, kl_p_q = log_z - elbo, upper - log_z
        elbo_se, iwae_se, upper_se, iwae_upper_se, kl_p_q_se = (
            torch.hypot(se, log_z_se) for se in (elbo_se, iwae_se, upper_se, iwae_upper_se, kl_p_q_se)
        )
        kl_q_p_se = elbo_se
    if draws.lacks_support:
        infinite = torch.full_like(log_z, math.inf)
        upper = upper_se = iwae_upper = iwae_upper_se = kl_p_q = kl_p_q_se = infinite
    return Evidence(
        elbo=elbo,
        elbo_se=elbo_se,
        iwae=iwae,
        iwae_se=iwae_se,
        iwae_particles=groups,
        upper=upper,
        upper_se=upper_se,
        iwae_upper=iwae_upper,
        iwae_upper_se=iwae_upper_se,
        upper_exact=exact is not None,
        log_z=log_z,
        log_z_se=log_z_se,
        kl_q_p=kl_q_p,
        kl_q_p_se=kl_q_p_se,
        kl_p_q=kl_p_q,
        kl_p_q_se=kl_p_q_se,
        prompts=tuple(draws.prompts.names) if draws.is_local else ("all prompts",),
        lacks_support=draws.lacks_support,
    )


def iwae_particles_of(num_samples: int, most: int = 64) -> int:
    """How many weights IWAE's means are taken over, from so many draws: at most `most`, and few enough for their error."""
    return min(most, max(1, num_samples // MIN_MEANS))


def _reverse_iwae(log_w: Tensor, exact: Draws | None, count: int) -> tuple[Tensor, Tensor]:
    """E[log Ẑ] with Ẑ the mean of `count` weights, one of them a posterior draw's, (B,), and its standard error.

    Without exact draws from the guide's own: such tuples have the density Ẑ/Z under the guide's."""
    if exact is None:
        bound = log_w[: len(log_w) // count * count].reshape(-1, count, log_w.shape[1]).logsumexp(1) - math.log(count)
        return weighted_mean(bound, bound)
    planted = exact.log_weight.flatten(0, 1)  # (S, B)
    groups = len(planted) if count == 1 else min(len(planted), len(log_w) // (count - 1))
    others = log_w[: groups * (count - 1)].reshape(groups, count - 1, log_w.shape[1])
    return mean(torch.cat([planted[:groups, None], others], 1).logsumexp(1) - math.log(count))


def _covariance(exact: Draws, log_z: Tensor) -> Tensor:
    """Of the mean log weight of exact draws and log Z from the proposals among which they were chosen, (B,): a proposal of
    large weight raises log Z, and is the likelier to be one of the draws."""
    if exact.proposals is None:
        return torch.zeros_like(log_z)
    if (
        not exact.proposals.from_prior
    ):  # their weights as proposals are not known any more: the largest error there can be
        se = [mean(exact.log_weight.flatten(0, 1))[1], log_mean(exact.proposals.log_weight.flatten(0, 1))[1]]
        return -se[0] * se[1]
    log_w, log_proposal_weight = (
        exact.log_weight.flatten(0, 1),
        exact.log_likelihood.flatten(0, 1),
    )  # the latter their own weight
    centred = log_w - log_w.mean(0)
    return ((log_proposal_weight - log_z).exp() * centred).mean(0) / exact.proposals.num_samples
