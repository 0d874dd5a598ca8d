"""Twists: what a text begun is expected to be worth, so that SMC keeps the beginnings that lead somewhere.

The intermediate targets are p0(x_≤t) ψ_t(x_≤t) / Z_t (Zhao et al. 2024). A twist is a network, whose logits are log ψ_t of
every next token at once, or a function of texts begun.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.twist import Function, PriorPower
from ppl_lm.infer.traces.observations import log_likelihood_of_text
from ppl_lm.infer.traces.text_site import text_law
from ppl_lm.lm.decoding.decoder import sample
from ppl_lm.lm.prompts import Prompts


def prefix_likelihood(model: Callable[..., Any]) -> Function:
    """ψ_t(x_≤t) = p(evidence | x_≤t), as if the text ended there: what the reward says of the part that is written."""

    def log_psi(prompts: Prompts, x: Int[Tensor, "N T"], n: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        return log_likelihood_of_text(model, prompts, x)

    return log_psi


def tempered(twist: Function, over: int) -> Function:
    """ψ_t^min(1, t / over): a path in β, from the prior's law (β = ∞) to the posterior's after `over` tokens."""
    if over < 1:
        raise ValueError(f"over={over}; give the number of tokens after which the twist counts in full, at least 1")

    def log_psi(prompts: Prompts, x: Int[Tensor, "N T"], n: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        return twist(prompts, x, n) * (n / over).clamp_max(1.0)

    return log_psi


def prior_power(alpha: float) -> PriorPower:
    """The twist of `power`: ψ_t(x_≤t) = p0(x_≤t)^(alpha - 1), for which no network is asked. With it the intermediate targets
    are powers of the prior, and without a guide each token is proposed by its own law to that power.

    :raises ValueError: unless alpha is above 0 and finite."""
    return PriorPower(alpha)


def look_ahead(model: Callable[..., Any], tokens: int, rollouts: int = 1) -> Function:
    """ψ_t(x_≤t) = mean of p(evidence | x_≤t and so many further tokens of the prior) over some rollouts, each as if it ended
    there: a random twist, and with as many tokens as there may be an unbiased one of the exact twist. A text that has ended is
    its own rollout. Where no rollout is possible that does not mean that nothing possible begins so: ψ_t is then as if half of
    one had a likelihood of 1, and never 0, which would lose texts.

    Each answer forwards the prompt, what is written and what is looked ahead at: ask it after a few numbers of tokens, by `at`
    of `SMCSettings`.

    :raises ValueError: unless both numbers are at least 1."""
    require_count("tokens", tokens)
    require_count("rollouts", rollouts)

    @torch.no_grad()
    def log_psi(prompts: Prompts, x: Int[Tensor, "N T"], n: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        vocabulary = prompts.vocabulary
        open_ = (vocabulary.lengths(x) > n).nonzero()[:, 0]  # given as if they ended after n tokens
        out = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        done = torch.ones_like(n, dtype=torch.bool).index_fill(0, open_, False).nonzero()[:, 0]
        if len(done):
            out[done] = log_likelihood_of_text(model, prompts.take(done), x[done]).double()
        if len(open_):
            rows = open_.repeat_interleave(rollouts)
            ahead = _rollouts(model, prompts.take(rows), x[rows], n[rows], tokens)
            each = log_likelihood_of_text(model, prompts.take(rows), ahead).double()
            seen = each.unflatten(0, (-1, rollouts)).logsumexp(-1)
            out[open_] = torch.where(seen == -torch.inf, math.log(0.5), seen) - math.log(rollouts)
        return out

    return log_psi


def _rollouts(
    model: Callable[..., Any], prompts: Prompts, x: Int[Tensor, "N T"], n: Int[Tensor, "N"], tokens: int
) -> Int[Tensor, "N T"]:
    """Texts that go on from their first n tokens by so many of the prior's, and then end."""
    lm, vocabulary = text_law(model, prompts).lm, prompts.vocabulary
    upto = (n + tokens).clamp_max(x.shape[-1])
    length = int(upto.max())
    u = torch.rand(len(x), length, dtype=torch.float64, device=x.device)
    drawn, _ = sample(lm, prompts, torch.arange(len(x), device=x.device), u, begun=x[:, :length], start=n)
    known = torch.arange(x.shape[-1], device=x.device) < upto.unsqueeze(-1)
    ahead = torch.full_like(x, vocabulary.pad_id)
    ahead[:, :length] = torch.where(known[:, :length], drawn, vocabulary.pad_id)
    cut = (~(vocabulary.is_end(ahead) & known).any(-1) & (upto < x.shape[-1])).nonzero()[:, 0]
    ahead[cut, upto[cut]] = vocabulary.end_ids[0]
    return ahead


def exact_twist(model: Callable[..., Any], prompts: Any) -> Function:
    """ψ_t(x_≤t) = E_p0[p(evidence | x) | x_≤t] by enumeration, for tiny vocabularies: with all tokens as `candidates` every
    weight is Z, and every draw the posterior's.

    :raises ValueError: where texts cannot be enumerated, or if the model has another latent site."""
    prompts = read_once(prompts, model)
    truth = enumerate_posterior(model, None, prompts)
    if len(truth.latents) != 1:
        raise ValueError(f"the model has the latent sites {sorted(truth.latents)}; a twist is of one text alone")
    (x,) = truth.latents.values()  # (N, B, T)
    law = text_law(model, prompts)
    log_prior = law.log_prob(x).detach()  # (N, B)
    log_joint = truth.log_joint.detach()
    known, rows_of = x[:, 0], law.prompts

    def log_psi(prompts: Prompts, x: Int[Tensor, "N T"], n: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        out = torch.empty(len(x), dtype=torch.float64, device=x.device)
        column = _rows_among(rows_of, prompts)
        for length in n.unique().tolist():
            mine = (n == length).nonzero()[:, 0]
            begins = (known[:, None, :length] == x[None, mine, :length]).all(-1)  # (outcomes, mine)
            joint = torch.where(begins, log_joint[:, column[mine]], -torch.inf).logsumexp(0)
            out[mine] = joint - torch.where(begins, log_prior[:, column[mine]], -torch.inf).logsumexp(0)
        return out.nan_to_num(-torch.inf, neginf=-torch.inf)

    return log_psi


def _rows_among(known: Prompts, prompts: Prompts) -> Int[Tensor, "N"]:
    """Which of the known prompts each of these is."""
    rows = {identity: b for b, identity in enumerate(known.identities())}
    return torch.tensor([rows[identity] for identity in prompts.identities()], device=known.ids.device)
