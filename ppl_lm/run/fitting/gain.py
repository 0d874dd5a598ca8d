"""How much closer to its posterior a guide is than the prior: what `fit` watches, in nats a prompt, without log Z."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from ppl_lm.infer.draws import Draws, NoSupportError, concatenate
from ppl_lm.infer.log_weights import kong_ess, weighted_mean
from ppl_lm.infer.objectives.catalogue import hard_constraint
from ppl_lm.infer.objectives.protocol import Objective
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.in_pieces import pieces, texts_a_piece
from ppl_lm.lm.prompts import Prompts

MOST_DRAWS = 8192  # draws of the prior in search of a possible text, for a prompt that lacks one
MOST_TEXTS, LEAST_TEXTS, FEW = 1024, 16, 8  # that a measurement draws; of how many prompts at the least
LEAST_EFFECTIVE = 5.0  # effective draws for each prompt, below which they give no standard error


class Gain:
    """ELBO(q) - ELBO(prior) = KL(prior ‖ p) - KL(q ‖ p). For objectives that ask for cover, and for posteriors that rule texts
    out, where both ELBOs are -inf: KL(p ‖ prior) - KL(p ‖ q) = E_p[log q - log prior].

    Where a latent site lies outside the prompt plate, all prompts have but one weight, their joint one: the gain is that of the
    joint posterior, divided by the number of prompts.

    :param seconds: what drawing from the prior may take; where few texts take as long it is measured on some of the prompts.
        None of the figures are then repeatable.
    :param seed: of which prompts these are.
    :param is_joint: whether that is so; `prior`: its draws; `rows`: of which prompts; `each`: seconds that a text of it took.
    :raises ValueError: if the posterior rules texts out and the objective cannot serve it.
    :raises NoSupportError: if no draw of the prior was possible for some prompt.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        batch: Prompts,
        objective: Objective,
        max_plate_nesting: int,
        seconds: float = math.inf,
        seed: int = 0,
    ):
        self.model, self.guide, self.batch = model, guide, batch
        self.max_plate_nesting = max_plate_nesting
        self.rows = torch.arange(len(batch))
        self.each = 0.0
        self.allows_hard = objective.allows_hard_constraints
        self.prior = self._of_prior() if seconds == math.inf else self._in_time(seconds, seed)
        log_w = self.prior.log_weight.flatten(0, 1)  # (S, B)
        self.is_joint = log_w.shape[1] < len(self.batch)
        self.per_prompt = log_w.shape[1] / len(self.batch)  # of a mean over weights, what a prompt has of it
        hard = not bool((log_w > -torch.inf).all())
        if hard and not self.allows_hard:
            raise hard_constraint(objective)
        self.covers = objective.mass_covering or hard
        self.before, self.se = log_w.mean(0), _se(log_w) * self.per_prompt
        if hard:
            self._require_possible(log_w, seconds)

    @property
    def least_seconds(self) -> float:
        """What it takes at the least to measure two guides, whose texts are scored by the prior as well."""
        return 2 * 2 * LEAST_TEXTS * self.each

    def _draws(self, law: Any, seconds: float) -> Draws:
        count = len(self.batch)
        size = max(2, texts_a_piece(self.batch, self.model, self.guide) // count)
        most, least = max(64, MOST_TEXTS // count), max(2, LEAST_TEXTS // count)
        sizes = [most] if seconds == math.inf else pieces(most, size, least, seconds)
        settings: Any = {"max_plate_nesting": self.max_plate_nesting}
        return concatenate([importance(self.model, law, self.batch, num_samples=n, **settings) for n in sizes])

    def _of_prior(self, seconds: float = math.inf) -> Draws:
        return self._draws(None, seconds)

    def _in_time(self, seconds: float, seed: int) -> Draws:
        """The prior's draws, by what a few take: of all prompts, or where so many are too slow of some, by chance."""
        everything, began = self.batch, time.monotonic()
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        self._choose(everything, order[:FEW])
        draws = self._of_prior(0.0)
        spent = time.monotonic() - began
        self.each = spent / (draws.num_samples * len(self.batch))
        two_of_each = int((seconds - spent) / (2 * self.each)) if self.each > 0 else len(everything)
        joint = draws.log_weight.shape[-1] < len(self.batch)
        count = len(everything) if joint else min(len(everything), max(FEW, two_of_each))
        if count == len(self.batch) and seconds <= spent:
            return draws
        self._choose(everything, order[:count])
        return self._of_prior(seconds - spent)

    def _choose(self, everything: Prompts, rows: Tensor) -> None:
        self.rows = rows.sort().values
        self.batch = everything if len(rows) == len(everything) else everything.take(self.rows)

    def _require_possible(self, log_w: Tensor, seconds: float) -> None:
        """Searches on for a possible text after each prompt; where the time is up one such prompt is enough."""
        began, total = time.monotonic(), log_w.shape[1]
        lacking = (log_w == -torch.inf).all(0).nonzero()[:, 0].cpu()
        count = log_w.shape[0]
        while len(lacking) and count < MOST_DRAWS and time.monotonic() - began < seconds:
            asked = self.batch if self.is_joint else self.batch.take(lacking)
            settings: Any = {"num_samples": log_w.shape[0], "max_plate_nesting": self.max_plate_nesting}
            more = importance(self.model, None, asked, **settings).log_weight.flatten(0, 1)
            lacking, count = lacking[(more == -torch.inf).all(0).cpu()], count + log_w.shape[0]
        if len(lacking) and (count >= MOST_DRAWS or len(lacking) == total):
            of = "all prompts together" if self.is_joint else f"prompt {int(self.rows[lacking[0]])}"
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
        before = self.before if self.is_joint else self._before(rows)
        terms = torch.where(share > 0, share * (log_w - before), 0.0)
        return self.per_prompt * float((terms.sum(0) / share.sum(0)).mean())

    def _before(self, rows: Tensor) -> Tensor:
        """The prior's ELBO of these prompts; of those that were not measured the mean of the others, which in the mean over
        steps is right."""
        known = torch.full((int(max(rows.max(), self.rows.max())) + 1,), float(self.before.mean()), dtype=torch.float64)
        known[self.rows] = self.before.cpu()
        return known.to(self.before.device)[rows]

    def measure(self, seconds: float = math.inf) -> tuple[float, float]:
        """Of the guide as it is, with a standard error, on fresh draws of it; where cover is asked for, on the prior's.

        :param seconds: what it may take.

        Later calls may be of KL(p ‖ q) although earlier ones were of the ELBO: compare what was measured under one `covers`."""
        if not self.covers:
            value = self._draws(self.guide, seconds).log_weight.flatten(0, 1) - self.before
            if bool(value.isfinite().all()) or not self.allows_hard:
                return self.per_prompt * float(value.mean()), math.hypot(self.per_prompt * _se(value), self.se)
            self.covers = True  # an impossible text has shown itself only now: every ELBO is -inf
        draws = self._of_prior(seconds)
        scored = draws.under(self.guide, self.max_plate_nesting)
        log_w, moved = draws.log_weight.flatten(0, 1), (scored.log_guide - draws.log_prior).flatten(0, 1)
        known = (log_w > -torch.inf).any(0)  # prompts of which these draws hold a possible text
        if not bool(known.any()):
            return 0.0, math.inf
        value, errors = weighted_mean(log_w[:, known], moved[:, known])
        gain = self.per_prompt * float(value.mean())
        if float(1 / kong_ess(log_w[:, known]).reciprocal().mean()) >= LEAST_EFFECTIVE:
            return gain, self.per_prompt * float(errors.square().sum().sqrt()) / len(value)
        # One weight's own spread says nothing of its error; that of many prompts' values does.
        return gain, float(value.std()) / math.sqrt(len(value)) if len(value) >= LEAST_EFFECTIVE else math.inf


def _se(values: Tensor) -> float:
    """Of the mean of (S, B) values, of B prompts whose draws are independent: what the spread of each prompt's says."""
    return float((values.var(0).sum() / len(values)).sqrt()) / values.shape[1]
