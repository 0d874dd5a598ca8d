"""`SequenceELBO`: the evidence lower bound, or another objective, for programs with whole texts among their latents."""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.objectives.baselines import (
    Baseline,
    BaselineFunction,
    LogZ,
    LogZFunction,
    MovingLogZ,
    as_estimate,
    leave_one_out,
)
from ppl_lm.infer.objectives.catalogue import hard_constraint, truncated_guide
from ppl_lm.infer.objectives.divergences import reverse_kl
from ppl_lm.infer.objectives.protocol import Objective, ObjectiveFunction, as_objective
from ppl_lm.infer.traces.gradients import ordinary_surrogate, plate_costs, sloped
from ppl_lm.infer.traces.objective_terms import as_terms
from ppl_lm.infer.traces.parameters import trainable_of_block
from ppl_lm.infer.traces.particles import Particles, run
from ppl_lm.infer.traces.sites import TextSite
from ppl_lm.infer.traces.sources import Source
from ppl_lm.infer.traces.structure import nesting_of


@dataclass(frozen=True)
class _Step:
    """What one step's particles give: the loss, and for each latent site of the guide what multiplies its score function.

    `pathwise`: whether reparameterised sites and the model's own parameters get their gradients too (reverse KL)."""

    value: float
    coefficients: dict[str, Tensor]
    pathwise: bool
    end_coefficient: Tensor | None = None


class SequenceELBO(ELBO):
    """-ELBO = Σ_prompts E_q[log q(z) - log p(z, evidence)], reverse KL to the posterior up to log Z, for the stock
    `pyro.infer.SVI` and for Pyro's `elbo(model, guide)` module; or the sum over prompts of another `objective`.

    KL-regularised RL is this bound: with `tilted`, β · ELBO = E_q[r] - β KL(q ‖ prior) (Korbak et al. 2022, eq. 7).

    One run of the programs draws K particles and scores texts without autograd; then only the texts are scored again
    with gradients, a micro-batch of particles at a time, against the coefficients found in the first phase. So autograd
    memory does not grow with K, and rewards are called once. The score-function coefficient of every token of particle
    k is

        (log q(z_k) - log p(z_k, evidence))  -  the mean of the same over the other particles,

    whose expectation is the exact gradient (Williams 1992; leave-one-out: Kool et al. 2019). What the tokens before t
    have cost may be left in or out; it stays in, because log q/p0 of a prefix is the guide's own estimate of the value
    that the prefix has gained (exactly that, at the posterior), and so the best baseline at hand: the closer the guide,
    the less noise, down to none. Ordinary sites may sit beside the text: reparameterised ones keep their pathwise
    gradient, others get the same score-function treatment, and learnable model parameters get theirs: with every baseline.

    :param num_particles: K, texts drawn for each prompt and step; at least 2, for the baseline.
    :param max_plate_nesting: as in Pyro, of the programs without the particles; None: found by a run of the programs that
        draws no text and asks no reward.
    :param micro_batch: texts scored with gradients at a time; None: as many as a memory budget allows. The gradient
        does not depend on it.
    :param objective: an `Objective`, or a plain function from `Terms` to an `Estimate`. Others than `reverse_kl` are for guides
        whose latent sites all lie in the prompt plate and models without parameters of their own; every site gets a
        score-function gradient. So it is for `reverse_kl` with a source.
    :param baseline: subtracted from the costs of f-divergences and `expected_reward`; others have their own.
    :param log_z: estimate of log Z in f-divergences other than reverse KL; None: a `MovingLogZ`. One from the same
        particles biases them by O(1/K); `of_others` leaves forward KL its direction.
    :param source: what draws the texts, if not the guide as it is: `Proposal`, `Reuse` or `Replay`. Objectives that take
        importance ratios for it use them, others need none, and `iwae` refuses.
        Objectives, estimates and sources that remember steps are for one fit each; `loss` moves them too.
    :param max_ratio: at which those ratios are truncated.
    :param clip_ratio: ε of PPO's clipped ratios: no gradient from a text (from a token in `grpo`) whose ratio has left
        1 ± ε the way its cost asks for.
    """

    def __init__(
        self,
        num_particles: int = 16,
        max_plate_nesting: int | None = None,
        micro_batch: int | None = None,
        objective: Objective | ObjectiveFunction = reverse_kl,
        baseline: Baseline | BaselineFunction = leave_one_out,
        log_z: LogZ | LogZFunction | None = None,
        source: Source | None = None,
        max_ratio: float = math.inf,
        clip_ratio: float | None = None,
    ):
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"num_particles={num_particles!r}; give a whole number, at least 2 for leave-one-out")
        if num_particles == 1 and baseline is leave_one_out:
            raise ValueError(
                "num_particles=1; the leave-one-out baseline needs at least 2. With one, give baseline=MovingAverage() "
                "or no_baseline, of ppl_lm.baselines"
            )
        kinds = {
            "baseline": (baseline, "give a function of costs and ratios: see ppl_lm.baselines"),
            "log_z": (log_z, "give a function of log weights and prompts, such as ppl_lm.baselines.MovingLogZ()"),
        }
        for name, (value, instead) in kinds.items():
            if isinstance(value, type) or not (value is None or callable(value)):
                raise ValueError(f"{name}={value!r}; {instead}")
        if isinstance(source, type) or not (source is None or isinstance(source, Source)):
            raise ValueError(f"source={source!r}; give a source of texts, such as ppl_lm.off_policy.Reuse(4)")
        if not max_ratio > 0 or (clip_ratio is not None and not clip_ratio > 0):
            raise ValueError(f"max_ratio={max_ratio}, clip_ratio={clip_ratio}; give numbers above 0")
        if source is None and (max_ratio < math.inf or clip_ratio is not None):
            raise ValueError("max_ratio and clip_ratio are for texts that the guide did not just draw: give a source")
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch}; give at least 1 text, or None")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.max_plate_nesting: Any = max_plate_nesting
        self._nesting: tuple[Any, Any, int] | None = None  # of which model and guide it is known
        self.micro_batch = micro_batch
        self.objective = as_objective(objective)
        self.baseline, self.log_z = as_estimate(baseline), as_estimate(log_z or MovingLogZ())
        self.source, self.max_ratio, self.clip_ratio = source, max_ratio, clip_ratio
        self._untouched = copy.deepcopy(self.baseline)
        self._baselines: dict[
            tuple[str, ...], Any
        ] = {}  # with a memory for each set of plates: costs are of another size
        self._kept: dict[Any, Tensor] = {}  # what estimates that remember steps gave for draws that may come again

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("SequenceELBO runs all particles at once: see particles.run")

    def particles(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Particles:
        """One run of guide and model: the first phase."""
        if args:
            args = (read_once(args[0], model, guide), *args[1:])
        nesting = self.nesting(model, guide, *args, **kwargs)
        return run(model, guide, args, kwargs, self.num_particles, nesting, self.source, self.pathwise)

    def nesting(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
        """`max_plate_nesting`, or what it is found to be for these programs, once."""
        known = self._nesting
        if known is None or known[0]() is not model or known[1]() is not guide:
            found = nesting_of(self.max_plate_nesting, model, guide, *args, **kwargs)
            known = self._nesting = weakref.ref(model), weakref.ref(guide), found
        return known[2]

    @property
    def pathwise(self) -> bool:
        """Whether reparameterised sites and the model's own parameters get their gradients through log q - log p: reverse KL
        on the guide's own draws, whatever the baseline."""
        return self.objective.is_negative_elbo and self.source is None

    @torch.no_grad()
    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Estimate of -ELBO in nats, or of another objective: the particles' mean, summed over prompts, as Pyro's ELBOs
        do."""
        return self._step(self.particles(model, guide, *args, **kwargs)).value

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """`loss`, with its gradient added to the `.grad` of every trainable parameter (`pyro.infer.SVI` calls this).

        :raises ValueError: if nothing is trainable, or the posterior has a hard constraint, which reverse KL cannot fit.
        """
        with trainable_of_block() as parameters:
            particles = self.particles(model, guide, *args, **kwargs)
        if not parameters:
            raise ValueError(
                "this step has nothing to train: guide and model registered no trainable parameter. Wrap the guide "
                "with ppl_lm.bind, around prior.copy() rather than the frozen prior"
            )
        return self.accumulate(particles)

    def accumulate(self, particles: Particles) -> float:
        """The second phase on its own: the gradient is added to `.grad`, a micro-batch at a time. Returns the loss."""
        step = self._step(particles)
        ordinary = ordinary_surrogate(particles, step.coefficients, step.pathwise)
        if ordinary.requires_grad:
            ordinary.backward()
        for part in self._sequence_surrogates(particles, step):
            part.backward()
        return step.value

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """`loss` as a tensor whose `backward` gives the same gradient as `loss_and_grads` (`elbo(model, guide)`)."""
        return self.differentiate(self.particles(model, guide, *args, **kwargs))

    def differentiate(self, particles: Particles) -> Tensor:
        """`accumulate` for whoever calls `backward` himself. The micro-batches are differentiated here and now, so that memory
        stays bounded; what is returned is linear in the weights with those gradients as its slopes."""
        step = self._step(particles)
        surrogate = ordinary_surrogate(particles, step.coefficients, step.pathwise)
        weights = [p for p in _text_weights(particles) if p.requires_grad]
        surrogate = surrogate + sloped(self._sequence_surrogates(particles, step), weights)
        if not surrogate.requires_grad:
            raise ValueError(
                "this step has nothing to train: neither guide nor model has a trainable parameter. Build the guide "
                "around prior.copy() rather than the frozen prior"
            )
        return surrogate - surrogate.detach() + step.value

    def _step(self, particles: Particles) -> _Step:
        """Loss and coefficients of these particles; moves what the estimates of log Z and the baselines remember."""
        if particles.is_hard() and not self.objective.allows_hard_constraints:
            raise hard_constraint(self.objective)
        if self.objective.mass_covering and particles.lacks_support():
            raise truncated_guide(self.objective)
        if not self.pathwise:
            return self._objective_step(particles)
        terms = [v.sum() for v in particles.log_q.values()] + [-v.sum() for v in particles.log_p.values()]
        values: list[Any] = [torch_item(term) for term in terms]
        coefficients = {}
        for part in plate_costs(particles):
            cost = self._minus_baseline(part.cost / part.scale, self._baseline_in(part.plates)) * part.scale
            coefficients |= dict.fromkeys(part.sites, cost)
        return _Step(sum(values) / particles.count, coefficients, pathwise=True)

    def _objective_step(self, particles: Particles) -> _Step:
        log_z, baseline = (self._once(f, particles.repeated) for f in (self.log_z, self.baseline))
        terms, scale = as_terms(particles, log_z, baseline, self.max_ratio, self.clip_ratio)
        estimate = self.objective(terms)
        if self.source is not None:
            self.source.update(terms, particles.guide)
        coefficient = estimate.coefficient * (scale if estimate.coefficient.dim() == 2 else scale.unsqueeze(-1))
        if not bool(coefficient.isfinite().all()):
            raise ValueError(
                "an objective gave a cost that is not finite; its values: " + str(estimate.value.tolist()[:4])
            )
        coefficients = {}
        for name, log_q in particles.log_q.items():
            inner = log_q.dim() - 2  # plates between particles and prompts
            coefficients[name] = coefficient.reshape(coefficient.shape[0], *[1] * inner, *coefficient.shape[1:])
        ends = None if estimate.end_coefficient is None else estimate.end_coefficient * scale.unsqueeze(-1)
        return _Step(float((estimate.value * scale.mean(0)).sum()), coefficients, False, ends)

    def _once(self, estimate: Any, repeated: bool) -> Callable[..., Tensor]:
        """An estimate from earlier steps must not have seen the draws that it is used for: for draws that come again it
        stays what it was, and learns nothing more."""

        def frozen(*args: Any) -> Tensor:
            if not repeated or estimate not in self._kept:
                self._kept[estimate] = estimate(*args)
            return self._kept[estimate]

        return frozen if self.source is not None and estimate.remembers_steps else estimate

    def _sequence_surrogates(self, particles: Particles, step: _Step) -> Iterator[Tensor]:
        """One scalar a micro-batch; the gradients of all add up to what texts add to the gradient."""
        for name, text in particles.texts().items():
            if not text.is_trainable:
                continue
            shape, coefficient = particles.token_log_q[name].shape, step.coefficients[name]  # (K, B, T)
            coefficient = coefficient if coefficient.dim() == len(shape) else coefficient.unsqueeze(-1)
            ends = None if step.end_coefficient is None else step.end_coefficient / particles.count
            yield from self._rescore(text, coefficient.expand(shape) / particles.count, ends)
        for name, text in particles.model_texts().items():
            if step.pathwise and text.is_trainable:
                weight = text.scaled(torch.ones_like(particles.token_log_p[name]))
                yield from self._rescore(text, -weight / particles.count)

    def _rescore(self, text: TextSite, coefficient: Tensor, ends: Tensor | None = None) -> Iterator[Tensor]:
        """Σ coefficient · log-probability of each token, (K, B, T) both, and Σ ends · that of ending there, a micro-batch of
        texts at a time."""
        law, x = text.law.expand(coefficient.shape[:-1]), text.value
        x = x.expand(*coefficient.shape[:-1], x.shape[-1]).reshape(-1, x.shape[-1])  # (K·B, T)
        flat = coefficient.reshape(x.shape)
        size = self.micro_batch or law.rows_per_pass(len(x), gradient=True)
        for rows in law.together(x.reshape(*coefficient.shape[:-1], -1)).split(size):
            if ends is None:
                yield (flat[rows] * law.slice(rows).token_log_probs(x[rows])).sum()
            else:
                by_token, ending = law.slice(rows).token_and_end_log_probs(x[rows])
                yield (flat[rows] * by_token + ends.reshape(x.shape)[rows] * ending).sum()

    def _baseline_in(self, plates: tuple[str, ...]) -> Any:
        """The baseline of sites in these plates. One that remembers steps must not see a step's costs before all of its sites
        have theirs."""
        if self.baseline.remembers_steps and plates not in self._baselines:
            self._baselines[plates] = copy.deepcopy(self._untouched) if self._baselines else self.baseline
        return self._baselines.get(plates, self.baseline)

    def _minus_baseline(self, cost: Tensor, baseline: Any) -> Tensor:
        """What multiplies the score functions, (K, *plates, B): unbiased since a baseline does not depend on a particle's own
        draw (leave-one-out: Kool et al. 2019). Along the particle dimension alone, never across prompts."""
        return cost - baseline(cost, torch.ones_like(cost))


def _text_weights(particles: Particles) -> list[Tensor]:
    """Weights of all language models that texts come from, each once."""
    texts = (*particles.texts().values(), *particles.model_texts().values())
    return list({id(weight): weight for text in texts for weight in text.law.lm.parameters()}.values())
