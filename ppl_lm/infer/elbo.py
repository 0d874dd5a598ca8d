"""`SequenceELBO`: the evidence lower bound for programs with whole texts among their latents."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from torch import Tensor

from ppl_lm.infer.particles import Particles, Site, is_sequence, run


class SequenceELBO(ELBO):
    """-ELBO = Σ_prompts E_q[log q(z) - log p(z, evidence)], reverse KL to the posterior up to log Z, for the stock
    `pyro.infer.SVI` and for Pyro's `elbo(model, guide)` module.

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
    gradient, others get the same score-function treatment, and learnable model parameters get theirs.

    :param num_particles: K, texts drawn for each prompt and step; at least 2, for the baseline.
    :param max_plate_nesting: as in Pyro, of the programs without the particles.
    :param micro_batch: texts scored with gradients at a time; None: as many as a memory budget allows. The gradient
        does not depend on it.
    """

    def __init__(self, num_particles: int = 16, max_plate_nesting: int = 1, micro_batch: int | None = None):
        if not isinstance(num_particles, int) or num_particles < 2:
            raise ValueError(f"num_particles={num_particles!r}; the leave-one-out baseline needs at least 2")
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch}; give at least 1 text, or None")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.max_plate_nesting = max_plate_nesting
        self.micro_batch = micro_batch

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("SequenceELBO runs all particles at once: see particles.run")

    def particles(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Particles:
        """One run of guide and model: the first phase."""
        return run(model, guide, args, kwargs, self.num_particles, self.max_plate_nesting)

    @torch.no_grad()
    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Estimate of -ELBO in nats: the particles' mean, summed over prompts, as Pyro's ELBOs do."""
        return self._value(self.particles(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """`loss`, with its gradient added to the `.grad` of every trainable parameter (`pyro.infer.SVI` calls this).

        :raises ValueError: if nothing is trainable, or the posterior has a hard constraint, which reverse KL cannot fit.
        """
        with poutine.trace(param_only=True) as capture:
            particles = self.particles(model, guide, *args, **kwargs)
        sites: Any = capture.trace.nodes.values()
        if not any(site["value"].unconstrained().requires_grad for site in sites if site["type"] == "param"):
            raise ValueError(
                "this step has nothing to train: guide and model registered no trainable parameter. Wrap the guide "
                "with ppl_lm.bind, around prior.copy() rather than the frozen prior"
            )
        ordinary = self._ordinary_surrogate(particles)
        if ordinary.requires_grad:
            ordinary.backward()
        for part in self._sequence_surrogates(particles):
            part.backward()
        return self._value(particles)

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """`loss` as a tensor whose `backward` gives the same gradient as `loss_and_grads` (`elbo(model, guide)`)."""
        return self.differentiate(self.particles(model, guide, *args, **kwargs))

    def differentiate(self, particles: Particles) -> Tensor:
        """The second phase on its own. The micro-batches are differentiated here and now, so that memory stays bounded;
        what is returned is linear in the weights with those gradients as its slopes."""
        surrogate = self._ordinary_surrogate(particles)
        weights = [p for p in _sequence_weights(particles) if p.requires_grad]
        slopes = [torch.zeros_like(p) for p in weights]
        for part in self._sequence_surrogates(particles):
            for slope, grad in zip(slopes, torch.autograd.grad(part, weights, allow_unused=True), strict=True):
                if grad is not None:
                    slope += grad
        for weight, slope in zip(weights, slopes, strict=True):
            surrogate = surrogate + (weight * slope).sum()
        if not surrogate.requires_grad:
            raise ValueError(
                "this step has nothing to train: neither guide nor model has a trainable parameter. Build the guide "
                "around prior.copy() rather than the frozen prior"
            )
        return surrogate - surrogate.detach() + self._value(particles)

    def _value(self, particles: Particles) -> float:
        terms = [v.sum() for v in particles.log_q.values()] + [-v.sum() for v in particles.log_p.values()]
        values: list[Any] = [torch_item(term) for term in terms]
        return sum(values) / particles.count

    def _ordinary_surrogate(self, particles: Particles) -> Tensor:
        """What ordinary sites add to the gradient: pathwise terms with their graph, score functions with theirs."""
        refuse_hard_constraints(particles)
        cost = particles.cost()
        surrogate = torch.zeros((), dtype=torch.float64)
        for name, site in particles.model_sites.items():
            if name in particles.log_p and not is_sequence(site):
                surrogate = surrogate - particles.log_p[name].sum()
        for name, site in particles.guide_sites.items():
            if is_sequence(site):
                continue
            if site["fn"].has_rsample:
                surrogate = surrogate + particles.log_q[name].sum()
            elif particles.log_q[name].requires_grad:
                coefficient: Any = cost.sum_to(site["cond_indep_stack"])
                score = site["fn"].log_prob(site["value"])
                surrogate = surrogate + (score * self._minus_baseline(coefficient, particles)).sum()
        return surrogate / particles.count

    def _sequence_surrogates(self, particles: Particles) -> Iterator[Tensor]:
        """One scalar a micro-batch; the gradients of all add up to what texts add to the gradient."""
        cost = particles.cost()
        for name, site in particles.guide_sites.items():
            if not is_sequence(site) or not _trainable(site):
                continue
            shape = particles.token_log_q[name].shape  # (K, B, T)
            coefficient: Any = cost.sum_to(site["cond_indep_stack"])
            coefficient = self._minus_baseline(coefficient.expand(shape[:-1]), particles).unsqueeze(-1)
            yield from self._rescore(site, coefficient.expand(shape) / particles.count)
        for name, site in particles.model_sites.items():
            if is_sequence(site) and _trainable(site):
                ones = torch.ones_like(particles.token_log_p[name])
                weight = scale_like(site, ones)
                yield from self._rescore(site, -weight / particles.count)

    def _rescore(self, site: Site, coefficient: Tensor) -> Iterator[Tensor]:
        """Σ coefficient · log-probability of each token, (K, B, T) both, a micro-batch of texts at a time."""
        fn, x = site["fn"].expand(coefficient.shape[:-1]), site["value"]
        x = x.expand(*coefficient.shape[:-1], x.shape[-1]).reshape(-1, x.shape[-1])  # (K·B, T)
        flat = coefficient.reshape(x.shape)
        size = self.micro_batch or fn.lm.rows_per_pass(fn.prompts.ids.shape[-1], x.shape[-1], gradient=True)
        for rows in torch.arange(len(x), device=x.device).split(size):
            by_token = fn.slice(rows).token_log_probs(x[rows])
            yield (flat[rows] * by_token).sum()

    def _minus_baseline(self, coefficient: Tensor, particles: Particles) -> Tensor:
        """Subtracts the mean over the *other* particles: it does not depend on this one's draw, so the gradient stays
        unbiased (Kool et al. 2019). Along the particle dimension alone, never across prompts."""
        n = particles.count
        return (coefficient - coefficient.mean(0, keepdim=True)) * (n / (n - 1))


def refuse_hard_constraints(particles: Particles) -> None:
    """Raises ValueError where the evidence rules a drawn text out: its reverse KL is infinite."""
    for name, log_p in particles.log_p.items():
        if particles.model_sites[name]["infer"].get("hard") or bool((log_p == -torch.inf).any()):
            raise ValueError(
                f"reverse KL cannot fit a hard constraint: site {name!r} gives texts probability 0, and the KL of a "
                "guide that ever draws one is infinite. Draw from this posterior with importance() or rejection(), or on the "
                "command line with ppl-lm sample MODEL --sampler rejection"
            )


def scale_like(site: Site, ones: Tensor) -> Tensor:
    """The site's scale and mask at every token."""
    scale, mask = site["scale"], site["mask"]
    wide = scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.dim() else scale
    return ones * wide if mask is None else ones * wide * torch.as_tensor(mask).unsqueeze(-1)


def _trainable(site: Site) -> bool:
    return any(p.requires_grad for p in site["fn"].lm.parameters())


def _sequence_weights(particles: Particles) -> list[Tensor]:
    sites = (*particles.guide_sites.values(), *particles.model_sites.values())
    found = {id(p): p for site in sites if is_sequence(site) for p in site["fn"].lm.parameters()}
    return list(found.values())
