"""`fit_twist`: a twist learned from rollouts."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.draws import Draws, NoSupportError, concatenate
from ppl_lm.infer.samplers.importance_sampling import importance, only_text
from ppl_lm.infer.traces.text_site import text_law
from ppl_lm.infer.twists.losses import Loss, Rollouts, ctl
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.network import Network
from ppl_lm.lm.scoring.shared_body import logits_of_both
from ppl_lm.lm.scoring.teacher_forcing import normalise


def fit_twist(
    model: Callable[..., Any],
    twist: LanguageModel,
    prompts: Any,
    *,
    loss: Loss = ctl,
    steps: int = 500,
    num_samples: int = 128,
    learning_rate: float = 1e-3,
    guide: Callable[..., Any] | None = None,
    positives: Draws | None = None,
) -> list[float]:
    """Fits a twist, in place, by Adam whose rate falls to zero; returns the losses.

    `bind(twisted, prior, twist)` is then a guide, and `smc(model, None, prompts, settings=SMCSettings(twist=twist))`
    uses it at every token.

    :param twist: from `twist_like(prior)`, or any network whose logits are log ψ_t.
    :param num_samples: texts drawn at each step for each prompt.
    :param guide: draws them; None: the prior. A closer guide sees more of what is worth something.
    :param positives: exact posterior draws (`rejection`), of which a fresh `num_samples` serve as σ's texts at each step;
        None: the rollouts themselves, weighted by φ.
    :raises NoSupportError: if no text of a prompt's first rollouts is possible.
    """
    free = [weight for weight in twist.parameters() if weight.requires_grad]
    if not free:
        raise ValueError("this twist has nothing to train; make one with twist_like(prior)")
    if steps < 1 or num_samples < 2:
        raise ValueError(f"steps={steps}, num_samples={num_samples}; give at least 1 and 2")
    prompts = read_once(prompts, model, guide)
    prior = text_law(model, prompts).lm
    twist.vocabulary.require_same(prior.vocabulary, "twist and target")
    optimiser = torch.optim.Adam(free, lr=learning_rate, betas=(0.9, 0.99))
    fall = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
    shift, losses = None, []
    for _ in range(steps):
        draws = importance(model, guide, prompts, num_samples=num_samples)
        if shift is None:
            shift = _log_mean_phi(draws)  # so that ψ = 1, where twists begin, is right on average
        posterior = None if positives is None else _draw_again(positives, num_samples)
        value = loss(rollouts(prior, twist, draws, posterior, shift))
        if not bool(value.isfinite()):
            raise ValueError(
                f"the loss is {float(value.detach())}; lower learning_rate, or use ctl or sixo, which are bounded"
            )
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        fall.step()
        losses.append(float(value.detach()))
    return losses


def rollouts(
    prior: Network, twist: LanguageModel, draws: Draws, positives: Draws | None = None, shift: Any = 0.0
) -> Rollouts:
    """What `twist` makes of texts, with gradients.

    :param draws: weighted to be p0's; with the likelihood on top σ's.
    :param positives: exact posterior draws, which then alone are σ's.
    :param shift: taken from log φ, nats."""
    log_prior = (draws.log_prior - draws.log_guide)[0].log_softmax(0)
    log_posterior = (log_prior + draws.log_likelihood[0]).log_softmax(0)
    if bool(log_posterior.isnan().any()):  # nothing is possible: then nothing is known of σ in these texts
        log_posterior = torch.where(log_posterior.isnan(), log_prior, log_posterior)
    if positives is not None:
        count = positives.log_guide.shape[1]
        nothing = torch.full((count, log_prior.shape[1]), -torch.inf, dtype=torch.float64, device=log_prior.device)
        log_prior = torch.cat([log_prior, nothing])
        log_posterior = torch.full_like(log_prior, -torch.inf)
        log_posterior[-count:] = -math.log(count)
        draws = concatenate([replace(draws, records={}, stats={}), replace(positives, records={}, stats={})])
    (name,) = only_text(draws)
    x = draws.latents[name][0]  # (K, B, T)
    count, batch, steps = x.shape
    rows = torch.arange(batch, device=x.device).expand(count, batch).flatten()
    prompts, flat = draws.prompts.take(rows), x.flatten(0, 1)
    alive = prior.vocabulary.alive(flat)
    priors, logits = logits_of_both(prior, twist, prompts, flat)  # (N, U, V)
    log_p = normalise(priors)
    here = flat[:, : logits.shape[1], None]
    psi = logits.gather(-1, here).squeeze(-1).double()
    value = (log_p + logits).logsumexp(-1).double()
    pad = lambda v: torch.nn.functional.pad(v, (0, steps - v.shape[1]))  # noqa: E731
    last = prior.vocabulary.lengths(flat).unsqueeze(-1) - 1
    at = (
        torch.arange(steps, device=x.device).expand_as(flat).minimum(last)
    )  # an ended text keeps what it had at its end
    shape = (count, batch, steps)
    return Rollouts(
        prior=log_prior,
        posterior=log_posterior,
        log_phi=draws.log_likelihood[0] - shift,
        log_psi=pad(psi).gather(-1, at).reshape(shape),
        log_value=torch.where(alive, pad(value), 0.0).reshape(shape),
        alive=alive.reshape(shape),
    )


def _log_mean_phi(draws: Draws) -> Float[Tensor, "B"]:
    log_w = (draws.log_prior - draws.log_guide)[0].log_softmax(0)
    mean = (log_w + draws.log_likelihood[0]).logsumexp(0)
    if bool((mean == -torch.inf).any()):
        raise NoSupportError(
            f"prompt {int((mean == -torch.inf).nonzero()[0])}: none of {draws.num_samples} texts is possible; raise "
            "num_samples, or give a guide that finds some"
        )
    return mean


def _draw_again(draws: Draws, count: int) -> Draws:
    """`count` of them, drawn anew, as one chain."""
    if draws.kind != "exact":
        raise ValueError("positives= must hold exact posterior draws (rejection); leave it out to weight the rollouts")
    pick = torch.randint(draws.num_samples, (count,), device=draws.log_guide.device)
    return draws.map(lambda v: v.flatten(0, 1)[pick].unsqueeze(0))
