"""Twists: what a text begun is expected to be worth, so that SMC keeps the beginnings that lead somewhere.

The intermediate targets are p0(x_≤t) ψ_t(x_≤t) / Z_t (Zhao et al. 2024). A twist is a network, whose logits are log ψ_t of
every next token at once, or a function of texts begun.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.twist import Function
from ppl_lm.infer.traces.observations import log_likelihood_of_text
from ppl_lm.infer.traces.text_site import text_law
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
