"""Figures of a diagnosis, typed: of a guide, or of draws. The names are the keys of `diagnosis.json`; standard errors end in
`_se`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

OPTIONAL = ("bellman", "elbo_gain", "khat", "log_likelihood", "reward")  # figures of a guide that there need not be


G = TypeVar("G", bound="GuideFigures")
D = TypeVar("D", bound="DrawsFigures")


@dataclass(frozen=True, kw_only=True)
class RecordedMeans:
    """Means of a number that the model records, by the prior, the guide and the posterior, with standard errors; None where
    one is infinite or not known."""

    prior: float | None
    prior_se: float | None
    guide: float | None
    guide_se: float | None
    posterior: float | None
    posterior_se: float | None


@dataclass(frozen=True, kw_only=True)
class GuideFigures:
    """Figures of a guide, of one prompt or averaged over them, nats where nothing else is said; see `ppl_lm.diagnose`.

    :param reward: in the reward's own unit; likewise `reward_prior` and `reward_posterior`; None of models without one.
    :param recorded: of whatever else the model records, each in its own unit, by name: the parts of a sum of rewards.
    :param bellman_rms: of a guide that a twist steers, the root of the mean square of its Bellman residuals after each token of
        the guide's own texts; `bellman_oscillation`, the sum over tokens of their range in these texts. None of other guides.
    :param ess: draws; `missing`, `possible` and `max_weight`: shares."""

    elbo: float
    elbo_se: float
    iwae: float
    iwae_se: float
    iwae_upper: float
    iwae_upper_se: float
    upper: float
    upper_se: float
    iwae_upper_exact: bool
    log_z: float
    log_z_se: float
    kl_q_p: float
    kl_q_p_se: float
    kl_p_q: float
    kl_p_q_se: float
    kl_prior_p: float
    kl_prior_p_se: float
    kl_p_prior: float
    kl_p_prior_se: float
    kl_q_prior: float
    kl_q_prior_se: float
    elbo_gain: float | None
    elbo_gain_se: float | None
    missing: float
    missing_se: float
    entropy: float
    entropy_se: float
    entropy_posterior: float
    entropy_posterior_se: float
    log_likelihood_prior: float | None
    log_likelihood: float | None
    log_likelihood_se: float
    log_likelihood_posterior: float | None
    seen: float
    bounded: bool
    possible: float
    reward: float | None = None
    reward_se: float | None = None
    reward_prior: float | None = None
    reward_prior_se: float | None = None
    reward_posterior: float | None = None
    reward_posterior_se: float | None = None
    recorded: dict[str, RecordedMeans] = field(default_factory=dict)
    bellman_rms: float | None = None
    bellman_oscillation: float | None = None
    ess: float
    ess_se: float
    khat: float | None
    khat_se: float | None
    max_weight: float
    num_samples: int
    exact_draws: int
    lm_tokens: int
    reward_calls: int

    @classmethod
    def from_json(cls: type[G], record: Mapping[str, Any]) -> G:
        """Of a record that may hold more than these."""
        known: dict[str, Any] = {f.name: record[f.name] for f in fields(cls) if f.name in record}
        known["recorded"] = {name: RecordedMeans(**means) for name, means in known.get("recorded", {}).items()}
        known = {name: _restored(name) if value is None else value for name, value in known.items()}
        return cls(**known)

    def as_json(self) -> dict[str, Any]:
        """Without the figures of a reward or a twist where there is none."""
        return {k: v for k, v in asdict(self).items() if v is not None or not k.startswith(("reward", "bellman"))}


@dataclass(frozen=True, kw_only=True)
class PromptFigures(GuideFigures):
    """Those of one prompt, with the verdict's code."""

    prompt: Any
    verdict: str


@dataclass(frozen=True)
class Mean:
    """A posterior mean with its Monte Carlo standard error; None where the draws give none."""

    value: float | None
    se: float | None


@dataclass(frozen=True, kw_only=True)
class DrawsFigures:
    """Figures of a sampler's draws, of one prompt or averaged over them; see `ppl_lm.diagnose_draws`. None where one does not
    apply.

    :param means: of the reward, the length and whatever else the model recorded, by name."""

    kind: str
    num_samples: int
    chains: int
    possible: float
    unique: float
    acceptance_rate: float | None
    ess: float | None
    ess_se: float | None
    max_weight: float | None
    khat: float | None
    khat_se: float | None
    log_z: float | None
    log_z_se: float | None
    kl_q_p: float | None
    kl_q_p_se: float | None
    ess_bulk: float | None
    ess_bulk_se: float | None
    ess_tail: float | None
    ess_tail_se: float | None
    r_hat: float | None
    r_hat_se: float | None
    lm_tokens: int
    reward_calls: int
    lm_tokens_per_effective_draw: float | None
    means: dict[str, Mean] = field(default_factory=dict)

    @classmethod
    def from_json(cls: type[D], record: Mapping[str, Any]) -> D:
        """Of a record that may hold more than these; whatever else has a standard error is a mean."""
        names = {f.name for f in fields(cls)} - {"means"}
        known: dict[str, Any] = {name: value for name, value in record.items() if name in names}
        means = {k: Mean(v, record[f"{k}_se"]) for k, v in record.items() if f"{k}_se" in record and k not in names}
        return cls(**known, means=means)

    def as_json(self) -> dict[str, Any]:
        record = asdict(self)
        for name, mean in record.pop("means").items():
            record |= {name: mean["value"], f"{name}_se": mean["se"]}
        return record


@dataclass(frozen=True, kw_only=True)
class PromptDrawsFigures(DrawsFigures):
    """Those of one prompt, with the verdict's code and sentence."""

    prompt: Any
    verdict: str
    sentence: str


def _restored(name: str) -> float | None:
    """What null means, which JSON has for NaN and infinities: an infinite distance or bound, or nothing that is known."""
    if name.startswith(OPTIONAL):
        return None
    if name in ("elbo", "iwae"):
        return -math.inf
    bound = name.removesuffix("_se") in ("elbo", "iwae", "upper", "iwae_upper")
    return math.inf if bound or name.startswith("kl_") else math.nan
