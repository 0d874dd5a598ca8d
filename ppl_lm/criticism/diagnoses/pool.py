"""`Pool`: draws of the prior and of the guide taken together, which see what either of them sees."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.criticism.weights import khat_threshold, psis_khat
from ppl_lm.infer.draws import Draws, concatenate
from ppl_lm.infer.log_weights import kong_ess

FAR = math.log(100.0)  # nats by which the posterior must exceed the guide where the guide is said to miss it


def pooled(prior: Draws, guide: Draws) -> Draws:
    """Draws of both, of one prompt, weighted to the posterior's by the balance heuristic (see `Pool`): they show what the guide
    never visits, too. `log_guide` is the density of the mixture.

    :param prior: draws of the prior, with `log_q` under the guide in their `stats`, as `Diagnosis.prior` has them."""
    both = concatenate([guide, prior])
    log_q = torch.cat([guide.log_guide, prior.stats["log_q"]], 1)
    return replace(both, log_guide=torch.logaddexp(both.log_prior, log_q) - math.log(2), lacks_support=False)


@dataclass(frozen=True)
class Pool:
    """N draws of the prior in row 0 and N of the guide in row 1, of one prompt, each with its log-probabilities, nats, float64.

    They stand for draws of the mixture ½ p0 + ½ q, the balance heuristic of multiple importance sampling (Veach & Guibas 1995):
    weights p(x, evidence) / (½ p0 + ½ q) are small where either proposes well, so that a good guide makes estimates sharp and
    the prior's half still shows the posterior mass that the guide never visits.
    """

    log_prior: Float[Tensor, "2 N"]
    log_likelihood: Float[Tensor, "2 N"]
    log_guide: Float[Tensor, "2 N"]
    lacks_support: bool = False  # the guide cannot draw all texts of the prior, whether a draw shows it or not

    @staticmethod
    def of(prior: Draws, guide: Draws) -> "Pool":
        """:param prior: draws of the prior with `log_guide` under the guide: `importance(model, None, ...).under(guide)`.
        :param guide: as many of the guide. Both of one prompt."""
        both = (prior, guide)
        row = lambda name: torch.stack([getattr(d, name).flatten() for d in both])  # noqa: E731
        return Pool(row("log_prior"), row("log_likelihood"), row("log_guide"), guide.lacks_support)

    @property
    def log_joint(self) -> Float[Tensor, "2 N"]:
        return self.log_prior + self.log_likelihood

    @property
    def log_z(self) -> Float[Tensor, ""]:
        """log of the mean weight, nats."""
        return (self._log_w.logsumexp(-1) - math.log(self._log_w.shape[1])).logsumexp(0) - math.log(2)

    @property
    def _log_w(self) -> Float[Tensor, "2 N"]:
        mixture = torch.logaddexp(self.log_prior, self.log_guide) - math.log(2)
        return torch.where(self.log_joint == -torch.inf, -torch.inf, self.log_joint - mixture)

    @property
    def relative(self) -> Float[Tensor, "2 N"]:
        """Weights over their mean, each row's share: what the posterior has there for each unit of the mixture, over 2."""
        return 0.5 * (self._log_w - self.log_z).exp()

    def evidence(self) -> tuple[float, float]:
        """log Z and its standard error (delta method), nats."""
        return float(self.log_z), _error(self.relative)

    def posterior(self, values: Float[Tensor, "2 N"]) -> tuple[float, float]:
        """E_p[values], self-normalised, and its standard error."""
        centre, influence = self._posterior(values)
        return float(centre), _error(influence)

    def kl_guide(self) -> tuple[float, float]:
        """KL(guide ‖ posterior) = log Z - E_q[log p(x, evidence) - log q], nats."""
        return self._kl_from(1, self.log_joint[1] - self.log_guide[1])

    def kl_prior(self) -> tuple[float, float]:
        """KL(prior ‖ posterior), nats."""
        return self._kl_from(0, self.log_likelihood[0])

    def eubo(self) -> tuple[float, float]:
        """E_p[log p(x, evidence) - log q] = log Z + KL(posterior ‖ guide): an upper bound of log Z, nats."""
        centre, influence = self._posterior(self.log_joint - self.log_guide)
        if centre == torch.inf or self.lacks_support:  # the guide cannot draw some text that the posterior has
            return math.inf, math.inf
        return float(centre), _error(influence)

    def kl_posterior(self) -> tuple[float, float]:
        """KL(posterior ‖ guide) = EUBO - log Z, nats."""
        centre, influence = self._posterior(self.log_joint - self.log_guide)
        if centre == torch.inf or self.lacks_support:
            return math.inf, math.inf
        return float(centre - self.log_z), _error(influence - self.relative)

    def kl_posterior_prior(self) -> tuple[float, float]:
        """KL(posterior ‖ prior) = E_p[log likelihood] - log Z, nats."""
        centre, influence = self._posterior(self.log_likelihood)
        return float(centre - self.log_z), _error(influence - self.relative)

    def missing(self) -> tuple[float, float]:
        """The coverage alarm: the posterior mass of the texts that are under the posterior more than 100 times as probable as
        under the guide."""
        return self.posterior((self.log_joint - self.log_z - self.log_guide > FAR).double())

    def entropy(self) -> tuple[float, float]:
        """Of the posterior, nats."""
        centre, influence = self._posterior(-self.log_joint)
        return float(centre + self.log_z), _error(influence + self.relative)

    def entropy_guide(self) -> tuple[float, float]:
        return float(-self.log_guide[1].mean()), float(self.log_guide[1].std()) / self.log_guide.shape[1] ** 0.5

    def seen(self, log_bound: float | None) -> float:
        """How many posterior draws the prior's alone are worth, whatever the guide: where the likelihood has a bound the number
        that rejection would accept, since no weight can then be larger than those that were seen may become; else their
        effective sample size, or 0 where k-hat says that larger weights are still to come."""
        log_w = self.log_likelihood[0]
        if log_bound is not None:
            return float((log_w - log_bound).exp().sum())
        khat = psis_khat(log_w)
        return float(kong_ess(log_w)) if khat is None or khat < khat_threshold(len(log_w)) else 0.0

    def _posterior(self, values: Float[Tensor, "2 N"]) -> tuple[Float[Tensor, ""], Float[Tensor, "2 N"]]:
        share = self.relative / self.relative.shape[1]
        values = torch.where(share > 0, values, 0.0)
        centre = (share * values).sum()
        centred = torch.where(share > 0, values - centre, 0.0)
        return centre, self.relative * centred

    def _kl_from(self, row: int, log_w: Float[Tensor, "N"]) -> tuple[float, float]:
        influence = self.relative.clone()
        influence[row] -= log_w
        value, error = float(self.log_z - log_w.mean()), _error(influence)
        return value, math.inf if math.isnan(error) else error  # of a distance that is infinite


def _error(influence: Float[Tensor, "2 N"]) -> float:
    """Of the sum of the rows' means, the rows drawn independently."""
    return float((influence.var(-1) / influence.shape[1]).sum().sqrt())
