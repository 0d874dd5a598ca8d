"""Rejection that learns: exact draws of a posterior with a checker, ever fewer of them in vain."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import TOLERANCE, Draws, NoSupportError, as_draws
from ppl_lm.infer.samplers.constraints.bound_checkers import (
    TEXTS,
    checkers_of,
    prompts_of,
    require_dead,
    require_evidence,
)
from ppl_lm.infer.samplers.constraints.dead_prefixes import DeadPrefixes
from ppl_lm.infer.samplers.constraints.trials import run_trials
from ppl_lm.infer.samplers.in_pieces import Progress, texts_a_piece
from ppl_lm.infer.samplers.sequential import laws, require_text_alone
from ppl_lm.infer.traces.observations import likelihood_bound, log_likelihood_of_text
from ppl_lm.infer.traces.particles import run
from ppl_lm.infer.traces.structure import nesting_of
from ppl_lm.infer.traces.text_site import TextIs
from ppl_lm.likelihood.checker import Checker
from ppl_lm.likelihood.reward import unasked
from ppl_lm.lm import meter
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.token_sequence import TokenSequence

FIRST = 16  # trials of each prompt at first: what they learn helps those that follow
ROUNDING = 1e-6  # of float32 probabilities, in 1 - p0(B)


@torch.no_grad()
def adaptive_rejection(
    model: Callable[..., Any],
    prompts: Any,
    *,
    checker: Checker | None = None,
    num_samples: int = 1000,
    max_proposals: int = 1_000_000,
    max_plate_nesting: int | None = None,
    on_progress: Progress | None = None,
) -> Draws:
    """`num_samples` exact, independent posterior draws for each prompt, by rejection that remembers which beginnings lead
    nowhere (constrained adaptive rejection: Parys et al. 2025).

    With B the texts whose beginnings are known to be dead, a trial draws x from the prior without B, token by token, and is
    left at the first token that the checker does not allow; that beginning then joins B, with the likeliest other tokens in its
    place that are not allowed. What is accepted in a trial has the posterior's law whatever was learned before it, since B
    holds none of its texts: so all are independent and exact, and the acceptance rate, Z / (1 - p0(B)) under a hard
    constraint, rises.

    `stats` holds bounds of log Z that are certain, nats, (1, 1, B): `log_z_lower`, from the distinct texts that were accepted,
    and `log_z_upper` = log(1 - p0(B)) + the likelihood's bound. `proposals` are the trials, weighted: their mean weight
    estimates Z without bias for a given number of trials.

    :param checker: None: the one that the model is bound to. The model must rule out what it rules out.
    :param max_proposals: trials for each prompt.
    :raises ValueError: if there is no checker or no bound of the likelihood, or if the checker is seen to rule out a text
        that the model allows, or the beginning of one that it allows itself.
    :raises NoSupportError: if a prompt has too few draws after `max_proposals`, or no text is left.
    """
    require_count("num_samples", num_samples)
    require_count("max_proposals", max_proposals)
    checker = _only_checker(model) if checker is None else checker
    prompts = read_once(prompts, model)
    with meter.measure() as cost:
        law, _ = laws(model, None, prompts)
        bound = likelihood_bound(model, prompts)
        if bound is None:
            raise ValueError(
                "adaptive_rejection needs a bound of the likelihood: declare the reward's r_max, or use smc()"
            )
        given = prompts_of(prompts, law)
        require_evidence(model, given, law, checker)
        search = _Search(model, given, law, checker, bound, nesting_of(max_plate_nesting, model, None, prompts))
        done, size = 0, max(1, texts_a_piece(prompts, model) // len(law.prompts))
        while (least := int(search.accepted.min())) < num_samples:
            if done >= max_proposals:
                worst = int(search.accepted.argmin())
                raise NoSupportError(
                    f"prompt {worst}: {least} of {done} trials were accepted, {num_samples} are needed; raise "
                    "max_proposals, or let the checker tell sooner where a text leads nowhere"
                )
            wanted = FIRST if not done else 1.1 * done * ((num_samples + 1) / (least + 1) - 1)
            n = max(1, min(max(FIRST, round(wanted)), size, max_proposals - done, max(FIRST, done)))
            search.go_on(n)
            done += n
            if on_progress is not None:
                rate = float(search.accepted.sum()) / (done * len(search.accepted))
                share = max(min(1.0, int(search.accepted.min()) / num_samples), done / max_proposals)
                on_progress(share, f"{rate:.2%} of {done} trials of each prompt accepted")
        draws = search.draws(num_samples)
    proposals = search.proposals(draws)
    return replace(draws, cost=cost, proposals=replace(proposals, cost=cost))


def _only_checker(model: Any) -> Checker:
    if len(found := checkers_of(model)) != 1:
        raise ValueError(
            f"the model is bound to {len(found)} checkers; give one, bind(constrained, prior, constraint=Checker(...)), or "
            "checker="
        )
    return found[0]


class _Search:
    """The trials so far, and what they taught, for each of B prompts."""

    def __init__(self, model: Any, given: Prompts, law: TokenSequence, checker: Checker, bound: float, nesting: int):
        self.model, self.given, self.law = model, given, law
        self.checker, self.bound, self.nesting = checker, bound, nesting
        batch = len(law.prompts)
        self.dead = [DeadPrefixes(law.lm.vocabulary.size) for _ in range(batch)]
        self.accepted = torch.zeros(batch, dtype=torch.int64)
        self.texts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(batch)]  # accepted: tokens, log p0 of each
        self.distinct: list[dict[tuple[int, ...], float]] = [{} for _ in range(batch)]  # and their log p(x, evidence)
        self.terms: list[tuple[Tensor, ...]] = []  # of each trial log p0, log-likelihood, log q; (n, B)
        empty = torch.full((2, batch, *law.event_shape), law.lm.vocabulary.pad_id, device=law.prompts.ids.device)
        empty[..., 0] = law.lm.vocabulary.end_ids[0]
        with unasked():
            dry = self._draws(empty, None)
        require_text_alone(dry)
        if float((dry.log_prior[0] - law.log_prob(empty)).abs().max()) > TOLERANCE:
            raise ValueError(
                "a scale or mask makes another law of the model's prior than its text is drawn from: use importance() or smc()"
            )
        self.seen = 0  # texts that the checker left, and that were looked at

    def go_on(self, n: int) -> None:
        """n more trials of each prompt, all without what was known to be dead before them.

        :raises NoSupportError: if nothing is left of a prompt."""
        if (worst := next((b for b, each in enumerate(self.dead) if each.root.is_dead), None)) is not None:
            raise NoSupportError(f"prompt {worst}: the checker allows no text that the prior can draw")
        batch = len(self.dead)
        rows = torch.arange(batch, device=self.law.prompts.ids.device).repeat(n)
        trials = run_trials(self.law, self.checker, self.dead * n, rows)
        died = (~trials.allowed).nonzero()[:, 0][: max(0, TEXTS - self.seen)]
        if len(died):
            self.seen += len(died)
            length = trials.length[died]
            require_dead(self.model, self.given, self.law, self.checker, trials.x[died], length, rows[died])
        allowed = trials.allowed.nonzero()[:, 0]
        log_prior = trials.token_log_p.sum(-1)
        log_l = torch.full_like(log_prior, -math.inf)
        if len(allowed):
            log_l[allowed] = log_likelihood_of_text(self.model, self.given.take(rows[allowed]), trials.x[allowed])
        if float(log_l.max()) > self.bound + TOLERANCE:
            raise ValueError(
                f"the likelihood's bound is {self.bound:.2f} nats, but a text reached {float(log_l.max()):.2f}: raise r_max"
            )
        kept = torch.rand_like(log_l).log() < log_l - self.bound
        for i in kept.nonzero()[:, 0].tolist():
            b = int(rows[i])
            self.texts[b].append((trials.x[i], trials.token_log_p[i]))
            self.distinct[b][tuple(trials.x[i].tolist())] = float(log_prior[i] + log_l[i])
        self.accepted += kept.reshape(n, batch).cpu().sum(0)
        self.terms.append(tuple(v.reshape(n, batch) for v in (log_prior, log_l, trials.log_q)))
        for i, b in enumerate(rows.tolist()):
            for tokens, log_p in trials.dead[i]:
                self.dead[b].add(tokens, log_p)

    def draws(self, num_samples: int) -> Draws:
        """The first accepted texts of each prompt."""
        each = [[torch.stack(parts) for parts in zip(*texts[:num_samples], strict=True)] for texts in self.texts]
        x, token_log_p = (torch.stack([parts[k] for parts in each], 1) for k in (0, 1))  # (S, B, T)
        draws = self._draws(*((v.repeat(2, 1, 1) if num_samples == 1 else v) for v in (x, token_log_p)))
        draws = draws.map(lambda v: v[:, :num_samples])
        left = torch.tensor([1.0 - each.probability + ROUNDING for each in self.dead], dtype=torch.float64)
        lower = torch.stack([torch.tensor([*known.values()]).double().logsumexp(0) for known in self.distinct])
        log_z = {"log_z_lower": lower, "log_z_upper": left.log() + self.bound}
        return replace(draws, kind="exact", stats={k: v.to(x.device).expand(1, 1, -1) for k, v in log_z.items()})

    def proposals(self, draws: Draws) -> Draws:
        """All trials, as weighted draws of the laws that they were drawn from."""
        log_prior, log_l, log_q = (torch.cat(parts).unsqueeze(0) for parts in zip(*self.terms, strict=True))
        plain = replace(draws, kind="weighted", latents={}, texts=(), records={}, log_likelihoods={}, stats={})
        return replace(plain, log_prior=log_prior, log_likelihood=log_l, log_guide=log_q)

    def _draws(self, x: Int[Tensor, "S B T"], token_log_p: Float64[Tensor, "S B T"] | None) -> Draws:
        plates = (len(x), *[1] * (self.nesting - 1), *x.shape[1:])
        known = None if token_log_p is None else token_log_p.reshape(plates)
        with TextIs(x.reshape(plates), known):
            return as_draws(run(self.model, None, (self.given,), {}, len(x), self.nesting))
