"""How much closer to its posterior a guide is than the prior: what `fit` watches, in nats a prompt, without log Z."""

import math
from typing import Any

import torch
from torch import Tensor

from ppl_lm.infer.draws import Draws, NoSupportError
from ppl_lm.infer.log_weights import kong_ess, weighted_mean
from ppl_lm.infer.objectives.catalogue import hard_constraint
from ppl_lm.infer.objectives.protocol import Objective
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.lm.prompts import Prompts

MOST_DRAWS = 8192  # draws of the prior in search of a possible text, for a prompt that lacks one
LEAST_EFFECTIVE = 5.0  # effective draws for each prompt, below which they give no standard error


class Gain:
    """ELBO(q) - ELBO(prior) = KL(prior ‖ p) - KL(q ‖ p). For objectives that ask for cover, and for posteriors that rule texts
    out, where both ELBOs are -inf: KL(p ‖ prior) - KL(p ‖ q) = E_p[log q - log prior].

    Where a latent site lies outside the prompt plate, all prompts have but one weight, their joint one: the gain is that of the
    joint posterior, divided by the number of prompts.

    :param is_joint: whether that is so.
    :raises ValueError: if the posterior rules texts out and the objective cannot serve it.
    :raises NoSupportError: if no draw of the prior was possible for some prompt.
    """

    def __init__(self, model: Any, guide: Any, batch: Prompts, objective: Objective, max_plate_nesting: int):
        self.model, self.guide, self.batch = model, guide, batch
        self.settings = {"num_samples": max(64, 1024 // len(batch)), "max_plate_nesting": max_plate_nesting}
        self.allows_hard = objective.allows_hard_constraints
        log_w = self._of_prior().log_weight.flatten(0, 1)  # (S, B)
        self.is_joint = log_w.shape[1] < len(batch)
        self.per_prompt = log_w.shape[1] / len(batch)  # of a mean over weights, what a prompt has of it
        hard = not bool((log_w > -torch.inf).all())
        if hard and not self.allows_hard:
            raise hard_constraint(objective)
        self.covers = objective.mass_covering or hard
        self.before, self.se = log_w.mean(0), _se((log_w - log_w.mean(0)).mean(1)) * self.per_prompt
        if hard:
            self._require_possible(log_w)

    def _of_prior(self) -> Draws:
        return importance(self.model, None, self.batch, **self.settings)

    def _require_possible(self, log_w: Tensor) -> None:
        lacking = (log_w == -torch.inf).all(0).nonzero()[:, 0].cpu()
        count = log_w.shape[0]
        while len(lacking) and count < MOST_DRAWS:
            asked = self.batch if self.is_joint else self.batch.take(lacking)
            more = importance(self.model, None, asked, **self.settings).log_weight.flatten(0, 1)
            lacking, count = lacking[(more == -torch.inf).all(0).cpu()], count + log_w.shape[0]
        if len(lacking):
            of = "all prompts together" if self.is_joint else f"prompt {int(lacking[0])}"
            raise NoSupportError(
                f"{of}: none of {count} draws of the prior is possible under the posterior, so there is "
                "nothing to learn from; loosen the constraint, or start from a prior that meets it more often"
            )

    def of_step(self, log_w: Tensor, moved: Tensor, rows: Tensor, share: Tensor) -> float:
        """From a step's particles, (K, B) or (K, 1): their log weights, log q - log prior, and what each counts in a mean
        under q.

        Where the prior's draws did not show that some texts are impossible, those are left out."""
        if self.covers:
            weight = (log_w + share.log()).softmax(0).nan_to_num(0.0)
            return self.per_prompt * float(torch.where(weight > 0, weight * moved, 0.0).sum(0).mean())
        share = torch.where(log_w > -torch.inf, share, 0.0)
        before = self.before if self.is_joint else self.before[rows]
        terms = torch.where(share > 0, share * (log_w - before), 0.0)
        return self.per_prompt * float((terms.sum(0) / share.sum(0)).mean())

    def measure(self) -> tuple[float, float]:
        """Of the guide as it is, with a standard error, on fresh draws of it; where cover is asked for, on the prior's.

        Later calls may be of KL(p ‖ q) although earlier ones were of the ELBO: compare what was measured under one `covers`."""
        if not self.covers:
            log_w = importance(self.model, self.guide, self.batch, **self.settings).log_weight.flatten(0, 1)
            value = (log_w - self.before).mean(1)
            if bool(value.isfinite().all()) or not self.allows_hard:
                return self.per_prompt * float(value.mean()), math.hypot(self.per_prompt * _se(value), self.se)
            self.covers = True  # an impossible text has shown itself only now: every ELBO is -inf
        draws = self._of_prior()
        scored = draws.under(self.guide, self.settings["max_plate_nesting"])
        log_w, moved = draws.log_weight.flatten(0, 1), (scored.log_guide - draws.log_prior).flatten(0, 1)
        known = (log_w > -torch.inf).any(0)  # prompts of which these draws hold a possible text
        if not bool(known.any()):
            return 0.0, math.inf
        value, errors = weighted_mean(log_w[:, known], moved[:, known])
        gain = self.per_prompt * float(value.mean())
        if float(1 / kong_ess(log_w[:, known]).reciprocal().mean()) >= LEAST_EFFECTIVE:
            return gain, self.per_prompt * float(errors.square().sum().sqrt()) / len(value)
        # One weight's own spread says nothing of its error; that of many prompts' values does.
        return gain, _se(value) if len(value) >= LEAST_EFFECTIVE else math.inf


def _se(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))
