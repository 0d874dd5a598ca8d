"""Bellman residuals: where a twist errs, token by token."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ppl_lm.infer.draws import Draws
from ppl_lm.infer.samplers.in_pieces import texts_a_piece
from ppl_lm.infer.samplers.twist import Twist
from ppl_lm.infer.traces.text_site import text_law
from ppl_lm.infer.twists.fitting import rollouts
from ppl_lm.infer.twists.losses import Rollouts
from ppl_lm.lm.language_model import LanguageModel


@torch.no_grad()
def bellman_residuals(model: Callable[..., Any], twist: Twist, draws: Draws) -> Float64[Tensor, "C S B steps"]:
    """δ of each text after t = 0, ..., T of its tokens, nats (C, S, B, T + 1):

        δ_t = log Σ_v p0(v | x_≤t) ψ_t+1(x_≤t, v) - log ψ_t(x_≤t),  and at the text's end log p(evidence | x) - log ψ(x)

    with ψ_0 = 1; 0 after the end. All but δ_0 are 0 of the exact twist, whose δ_0 is log Z.

    With q ∝ p0 ψ, token by token, a text's log weight is Σ_t δ_t. So log Z lies between E_q Σδ and E_p Σδ, p the posterior;
    KL(q ‖ p) + KL(p ‖ q) = (E_p - E_q) Σδ; and the weights' squared coefficient of variation is at most
    sinh²(½ Σ_t>0 (max δ_t - min δ_t)), the extremes taken over all texts.

    :param twist: a network whose logits are log ψ, from `twist_like`.
    :param draws: of any law, one text each: of `bind(twisted, prior, twist)` for E_q, exact ones for E_p.
    :raises ValueError: if a draw has another latent site than one text."""
    if not isinstance(twist, LanguageModel):
        raise ValueError(
            f"the twist is a {type(twist).__name__}; give a network, which answers for all next tokens at once: a function "
            "would have to be asked of each"
        )
    prior = text_law(model, draws.prompts).lm
    bare = replace(draws, records={}, stats={}, proposals=None).map(lambda v: v.flatten(0, 1).unsqueeze(0))
    size = max(1, texts_a_piece(draws.prompts, model, None) // len(draws.prompts))
    parts = []
    for start in range(0, bare.num_samples, size):
        piece = bare.map(lambda v, s=start: v[:, s : s + size])
        even = torch.zeros_like(piece.log_guide)  # rollouts weigh texts against each other, which nothing here looks at
        parts.append(residuals_of(rollouts(prior, twist, replace(piece, log_guide=even, log_prior=even))))
    return torch.cat(parts).unflatten(0, draws.log_guide.shape[:2])


def residuals_of(texts: Rollouts) -> Float64[Tensor, "K B steps"]:
    """The same of rollouts whose log φ is not shifted."""
    alive, last = texts.alive, texts.alive.sum(-1, keepdim=True)
    before = torch.nn.functional.pad(texts.log_psi, (1, 0))[..., :-1]
    delta = torch.nn.functional.pad(torch.where(alive, texts.log_value - before, 0.0), (0, 1))
    end = texts.log_phi.unsqueeze(-1) - texts.log_psi.gather(-1, last - 1)
    return delta.scatter(-1, last, end)
