"""Power-scaling: how much a posterior would change with a stronger or weaker prior or reward, from the draws at hand."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.criticism.expectations import expectation
from ppl_lm.criticism.predictive_checks import shares
from ppl_lm.criticism.statistics import Statistic, numbers, recorded
from ppl_lm.criticism.weights import khat_threshold, pareto_smooth, psis_khat, smooth
from ppl_lm.infer.draws import EQUAL, TOGETHER, Draws, NoSupportError
from ppl_lm.infer.log_weights import kong_ess

COMPONENTS = ("likelihood", "prior")
DELTA = 0.01  # of the finite difference, as ArviZ has it
MIN_ESS = 30.0  # effective draws, below which a mean's standard error cannot be trusted
THRESHOLD = (
    0.05  # of Kallioinen et al., about the shift of a normal's mean by 0.05 of its deviations for a doubled power
)


@dataclass(frozen=True)
class Scaled:
    """The posterior p0(x)^a L(x)^b with one of the powers at `alpha`, the other at 1.

    :param component: whose power it is: `likelihood` or `prior`.
    :param khat: k-hat of the weights; None where their tail is tied or short, and the ESS decides.
    :param ess: Kong's, of the weights.
    :param means: number -> mean and its Monte Carlo standard error; None where the weights cannot be trusted.
    """

    component: str
    alpha: float
    khat: float | None
    ess: float
    means: dict[str, tuple[float, float]] | None


@dataclass(frozen=True)
class Sensitivity:
    """How the means of numbers hang on the powers of prior and likelihood.

    :param means: of the posterior as it is, number -> mean and standard error.
    :param scaled: one for each component and alpha.
    :param sensitivity: component -> number -> d(cumulative Jensen-Shannon distance) / d log2 alpha at alpha = 1; None of a
        number that never changes.
    """

    means: dict[str, tuple[float, float]]
    scaled: list[Scaled]
    sensitivity: dict[str, dict[str, float | None]]

    def word(self, name: str) -> str:
        """What the two sensitivities of a number say of β: below 0.05 is as good as none."""
        of_likelihood, of_prior = (self.sensitivity[component][name] for component in COMPONENTS)
        if of_likelihood is None or of_prior is None:
            return "it never changes"
        if of_likelihood < THRESHOLD:
            return "β hardly matters for it" + (": the prior decides" if of_prior >= THRESHOLD else "")
        return "β decides it, against the prior" if of_prior >= THRESHOLD else "β decides it, the prior hardly matters"

    def __str__(self) -> str:
        """A line for each number, and below it its means at each power."""
        lines = []
        for name, (value, se) in self.means.items():
            lines.append(f"{name} {value:.3f} ± {se:.3f}: {self.word(name)}")
            for one in self.scaled:
                estimate = None if one.means is None else one.means[name]
                shown = (
                    f"not known: ESS {one.ess:.0f}" if estimate is None else f"{estimate[0]:.3f} ± {estimate[1]:.3f}"
                )
                lines.append(f"    {one.component} to the power {one.alpha:g}: {shown}")
        return "\n".join(lines)


def power_scale(
    draws: Draws, alphas: Sequence[float] = (0.8, 1.25), statistics: Mapping[str, Statistic] | None = None
) -> Sensitivity:
    """Prior and likelihood sensitivity by power-scaling (Kallioinen et al. 2023), without a new run.

    The posterior's draws are reweighted by likelihood^(alpha - 1), or prior^(alpha - 1), and the weights Pareto-smoothed. For
    `tilted` a likelihood at power alpha is the reward at the temperature β/alpha: its means are those at β/alpha. A prior at
    power alpha is the prior of whole texts at temperature 1/alpha, which no temperature of single tokens is
    (`models/power.py`). Both at once are a posterior at temperature 1/alpha.

    The means are of the reward and what else the model recorded, the length, log p of the prior (as in `diagnose_draws`) and
    the `statistics`. Their errors are those of importance sampling; of chains they take autocorrelation into account, and draws
    that came about together are not smoothed. They are None where k-hat is above its threshold, or the ESS below 30: then draw
    at that β.

    `sensitivity` is the square root of the cumulative Jensen-Shannon divergence (base 2, divided by its bound; the larger one
    of the number and its negative) between the posteriors at alpha = 1.01 and 1, and at 1/1.01 and 1, over 2 log2 1.01. Text
    is always sensitive to its prior: that both are large is no conflict by itself, but says that β trades one against the
    other.

    :param draws: posterior draws of any kind, of one prompt: `draws.of_prompt(b)`.
    :param alphas: powers, above 0. A text with likelihood 0 has probability 0 at every one of them.
    :param statistics: name -> function from texts to one finite number each.
    :raises ValueError: of more prompts than one, an alpha that is not above 0, NaN among log-probabilities, fewer than 2 draws,
        or a statistic that is not one finite number a text or has the name of one of the draws' own numbers.
    :raises NoSupportError: if all weights are zero.
    """
    bad = [alpha for alpha in alphas if not 0 < alpha < math.inf]
    if bad:
        raise ValueError(f"alphas={list(alphas)}; powers must be above 0 and finite")
    if draws.log_guide.shape[-1] != 1:
        raise ValueError(f"draws of {draws.log_guide.shape[-1]} prompts; give those of one: draws.of_prompt(b)")
    if draws.num_samples < 2:
        raise ValueError("one draw has no standard error; give at least 2")
    draws = draws.map(lambda v: v.cpu())
    if bool((draws.log_prior.isnan() | draws.log_likelihood.isnan() | draws.log_guide.isnan()).any()):
        raise ValueError("a log-probability is NaN; give draws as a sampler made them")
    values = numbers(recorded(draws, statistics))
    base = pareto_smooth(draws)
    share = shares(base)
    wrong = [key for key, value in values.items() if not bool(value.flatten()[share > 0].isfinite().all())]
    if wrong:
        raise ValueError(f"{wrong} are NaN or infinite in possible draws; their means do not exist")
    scaled = [_scaled(draws, component, alpha, values) for component in COMPONENTS for alpha in alphas]
    steps = {
        c: [weights(draws, power(draws, c, a)).flatten() for a in (1 / (1 + DELTA), 1 + DELTA)] for c in COMPONENTS
    }
    return Sensitivity(
        means={key: expectation(base, value).item() for key, value in values.items()},
        scaled=scaled,
        sensitivity={c: {key: _slope(v.flatten(), share, steps[c]) for key, v in values.items()} for c in COMPONENTS},
    )


def power(draws: Draws, component: str, alpha: float) -> Float[Tensor, "C S 1"]:
    """Log weights for the posterior with one component at the power alpha, nats.

    :raises NoSupportError: if all are zero."""
    log_f = draws.log_likelihood if component == "likelihood" else draws.log_prior
    log_w = torch.zeros_like(draws.log_weight) if draws.kind in EQUAL else draws.log_weight
    if draws.kind == "conditional_runs":  # each run has a posterior draw of its own, whatever its Ẑ
        log_w = log_w - log_w.logsumexp(1, keepdim=True)
    possible = (log_w > -torch.inf) & (log_f > -torch.inf)
    if not bool(possible.any()):
        raise NoSupportError("all weights are zero: no draw of the guide is possible under the posterior")
    return torch.where(possible, log_w + (alpha - 1) * log_f, -torch.inf)


def weights(draws: Draws, log_w: Float[Tensor, "C S 1"]) -> Float[Tensor, "C S 1"]:
    """Normalised, Pareto-smoothed but for draws that came about together."""
    flat = log_w.flatten(0, 1)
    return (flat if draws.kind in TOGETHER else smooth(flat)).softmax(0).reshape(log_w.shape)


def cjs(x: Float[Tensor, "N"], p: Float[Tensor, "N"], q: Float[Tensor, "N"]) -> float | None:
    """Cumulative Jensen-Shannon distance of two laws on the same points, from 0 to 1; None if there is one point only.

    With F and G the two CDFs and M their mean, the square is ∫ F log2(F/M) + G log2(G/M) dx over ∫ F + G dx (Nguyen & Vreeken
    2015; the paper's terms in F - G cancel in the sum)."""
    order = x.argsort()
    width = x[order].diff()
    if not len(width) or float(width.sum()) == 0:
        return None
    f, g = (w[order].cumsum(0)[:-1].clamp(0, 1) for w in (p, q))
    middle = (f + g) / 2
    total = (torch.xlogy(f, f) + torch.xlogy(g, g) - torch.xlogy(f + g, middle)) / math.log(2)
    bound = float((width * (f + g)).sum())
    return math.sqrt(max(0.0, float((width * total).sum())) / bound) if bound > 0 else 0.0


def _slope(x: Float[Tensor, "S"], share: Float[Tensor, "S"], steps: list[Tensor]) -> float | None:
    """Mean of the distances to both sides, for each doubling of alpha."""
    seen = share > 0
    distances = [[cjs(sign * x[seen], share[seen], q[seen]) for sign in (1, -1)] for q in steps]
    largest = [max(d for d in pair if d is not None) for pair in distances if None not in pair]
    return sum(largest) / (2 * math.log2(1 + DELTA)) if len(largest) == len(steps) else None


def _scaled(draws: Draws, component: str, alpha: float, values: dict[str, Tensor]) -> Scaled:
    log_w = power(draws, component, alpha)
    amount, khat = float(kong_ess(log_w.flatten())), psis_khat(log_w.flatten())
    trusted = amount >= MIN_ESS and (khat is None or khat < khat_threshold(draws.num_samples))
    means = None
    if trusted:
        scaled = weights(draws, log_w)
        means = {key: expectation(draws, value, scaled).item() for key, value in values.items()}
    return Scaled(component, alpha, khat, amount, means)
