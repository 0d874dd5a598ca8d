"""One sample site of a Pyro trace: what kind it is, and its log-probability."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_site_shape
from torch import Tensor

from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.lm.experts import cuts_of
from ppl_lm.lm.token_sequence import TokenSequence

Site = dict[str, Any]


@dataclass(frozen=True)
class TextSite:
    """A text of a run: the distribution that it is drawn from, and its value.

    :param value: token ids, (*plates, B, T), the particles' plate first.
    :param scale: of `poutine.scale` and of plates that subsample: a number, or a tensor that broadcasts to (*plates, B);
        `mask` likewise, or None."""

    law: TokenSequence
    value: Tensor
    scale: Any
    mask: Any

    @classmethod
    def of(cls, site: Site) -> "TextSite":
        return cls(site["fn"], site["value"], site["scale"], site["mask"])

    @property
    def is_trainable(self) -> bool:
        return any(weight.requires_grad for weight in self.law.lm.parameters())

    def scaled(self, values: Tensor) -> Tensor:
        """Values of every token, (*plates, B, T), by the site's scale and mask."""
        scale, mask = self.scale, self.mask
        wide = scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.dim() else scale
        return values * wide if mask is None else values * wide * torch.as_tensor(mask).unsqueeze(-1)


def sites_of(program: Callable[..., Any], *args: Any) -> dict[str, Site]:
    """Runs a program; its sample sites by name."""
    return sample_sites(poutine.trace(program).get_trace(*args))


def sample_sites(trace: Any) -> dict[str, Site]:
    """The sample sites of a Pyro trace by name, without those that plates make to subsample."""
    nodes: Any = prune_subsample_sites(trace).nodes
    return {n: s for n, s in nodes.items() if s["type"] == "sample"}


def is_sequence(site: Site) -> bool:
    return isinstance(site["fn"], TokenSequence)


def check_shape(site: Site, log_prob: Tensor, nesting: int) -> None:
    """Each dimension is that of the particles or of a plate. Pyro's own check leaves others to enumeration. Here nothing is
    enumerated, and a program that is right for one particle may pair each with every other there.

    :param nesting: how many plates lie within each other, the particles' among them.
    :raises ValueError: if the plates lie deeper, if one is missing around the site, or if a size is not its plate's."""
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    if (depth := max((-dim for dim in plates), default=0)) > nesting:
        raise ValueError(
            f"site {site['name']!r} lies deeper in plates than max_plate_nesting={nesting - 1}: give at least {depth - 1}, or "
            "leave it out, and it is found"
        )
    for dim, size in zip(range(-log_prob.dim(), 0), log_prob.shape, strict=True):
        if dim not in plates and (size > 1 or -dim > nesting):
            raise ValueError(
                f"site {site['name']!r} has log-probabilities of shape {tuple(log_prob.shape)}, and no plate around it has the "
                f"dimension {dim}: put it into a pyro.plate, or call .to_event on its law. Or values of several particles have "
                "met crosswise: their dimension is left of all plates; let them broadcast, and count dimensions from the right"
            )
    shaped: Any = {**site, "log_prob": log_prob}
    if pyro.settings.get("validate_poutine"):
        check_site_shape(shaped, nesting)


def log_density(site: Site) -> Tensor:
    """Log-probability of a site's value as its distribution has it, unscaled and unmasked, without autograd for texts."""
    return score_site("", {**site, "scale": 1.0, "mask": None}, {})


def log_shift(site: Site) -> Tensor:
    """What a bounded `Optimality` subtracts of its log-potential, scaled and masked as its log-probability is."""
    return scale_and_mask(shift_of(site["fn"]).to(site["value"].device), site["scale"], site["mask"])


def shift_of(fn: Any, whatever_masked: bool = False) -> Tensor:
    """What a law's log-probability lies below its log-potential, of each element of a batch, whatever the law is wrapped in:
    `log_bound` of a bounded `Optimality`, 0 of others and where a mask is False.

    :param whatever_masked: the most that it can be, whatever the masks are."""
    if isinstance(fn, Independent):
        base = shift_of(fn.base_dist, whatever_masked)
        return base.flatten(len(fn.batch_shape)).sum(-1) if base.dim() > len(fn.batch_shape) else base
    if isinstance(fn, ExpandedDistribution):
        return shift_of(fn.base_dist, whatever_masked).expand(fn.batch_shape)
    if isinstance(fn, MaskedDistribution):
        base = shift_of(fn.base_dist, whatever_masked)
        return base.clamp_min(0.0) if whatever_masked else base * torch.as_tensor(fn._mask, dtype=torch.float64).cpu()
    bound = (fn.log_bound or 0.0) if isinstance(fn, Optimality) else 0.0
    return torch.full(fn.batch_shape, bound, dtype=torch.float64)


def layers(fn: Any) -> list[Any]:
    """A law that is `.to_event`, `.expand`ed or `.mask`ed, what it is made of, and so on to the law itself, which is last."""
    wrapped = isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution)
    return [fn, *layers(fn.base_dist)] if wrapped else [fn]


def unwrapped(fn: Any) -> Any:
    return layers(fn)[-1]


def is_density(site: Site) -> bool:
    """Whether an observed site's log-probability is that of a normalised law: neither of `Optimality`, whose exp(r/β) has any
    norm, nor of `pyro.factor`, nor raised to a power by `poutine.scale`."""
    fn = unwrapped(site["fn"])
    return not isinstance(fn, Optimality | Unit) and bool((torch.as_tensor(site["scale"]) == 1).all())


def score_site(name: str, site: Site, tokens: dict[str, Tensor]) -> Tensor:
    fn, value, mask = site["fn"], site["value"], site["mask"]
    scale: Any = site["scale"]  # a tensor under poutine.scale(scale=tensor)
    if not is_sequence(site):
        return scale_and_mask(fn.log_prob(value, *site["args"], **site["kwargs"]), scale, mask)
    with torch.no_grad():
        by_token = fn.sampled_log_probs(value)
        if by_token is None:
            by_token = fn.token_log_probs(value)
        wide: Any = scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.dim() else scale
        tokens[name] = scale_and_mask(by_token, wide, mask.unsqueeze(-1) if isinstance(mask, Tensor) else mask)
        canonical = fn.lm.vocabulary.is_canonical(value)
        total = tokens[name].sum(-1)
        return total if bool(canonical.all()) else total.masked_fill(~canonical, -torch.inf)


def same_law(site: Site, twin: Site) -> bool:
    """Whether model and guide draw a sequence site from the same network, prompts, scale and mask."""
    if not (is_sequence(site) and is_sequence(twin)):
        return False
    a, b = site["fn"], twin["fn"]
    same_prompts = a.prompts is b.prompts or (
        torch.equal(a.prompts.ids, b.prompts.ids) and torch.equal(a.prompts.lengths, b.prompts.lengths)
    )
    same_scale = all(type(site[k]) is not Tensor and site[k] == twin[k] for k in ("scale", "mask"))
    if not same_prompts:
        a.prompts.vocabulary.require_same(b.prompts.vocabulary, "guide and target")
    return a.lm is b.lm and same_prompts and same_scale


def lacks_support(law: TokenSequence, of: TokenSequence | None) -> bool:
    """Whether a text's law has been truncated (`ppl_lm.lm.truncated`) where another has not: it cannot draw all that the other
    can."""
    return bool(cuts_of(law.lm.model) - (frozenset() if of is None else cuts_of(of.lm.model)))


def is_record(site: Site) -> bool:
    return bool(site["infer"].get("_deterministic"))
