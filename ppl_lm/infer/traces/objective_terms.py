"""What objectives see of a run's particles."""

import math
from typing import Any

import torch
from jaxtyping import Float64
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from ppl_lm.infer.terms import Prefixes, Terms
from ppl_lm.infer.traces.particles import Particles, by_prompt
from ppl_lm.infer.traces.sites import is_record, is_sequence, sample_sites, score_site
from ppl_lm.lm.token_sequence import TokenSequence


def as_terms(
    particles: Particles,
    estimate_log_z: Any,
    baseline: Any,
    max_ratio: float = math.inf,
    clip_ratio: float | None = None,
) -> tuple[Terms, Float64[Tensor, "K B"]]:
    """What objectives see, and the scale of each text, (K, B), taken out of it: that of its plate, or `poutine.scale`.

    :raises ValueError: if only a joint weight of all prompts exists, or the model has parameters of its own."""
    if not particles.is_local:
        raise ValueError(
            "a latent site lies outside the prompt plate: only reverse_kl without a source is defined for such "
            "programs; another objective, or texts of a source, need every latent site in it"
        )
    for name, site in particles.model_sites.items():
        own = is_sequence(site) and any(p.requires_grad for p in site["fn"].lm.parameters())
        if own or (name in particles.log_p and particles.log_p[name].requires_grad):
            raise ValueError(
                f"site {name!r} of the model has parameters of its own: only reverse_kl without a source learns them; "
                "freeze them for another objective, or for texts of a source"
            )
    shape = (particles.count, len(particles.prompts))
    text = particles.first_text()
    ones = torch.ones(shape, dtype=torch.float64, device=text["value"].device)
    scale = scale_and_mask(ones, text["scale"], text["mask"]).expand(shape)
    if not bool((scale > 0).all()):
        raise ValueError(
            "a text is masked or scaled by 0: only reverse_kl without a source is defined there; take its prompt out of "
            "the batch"
        )
    inverse = 1 / scale
    for name, site in particles.guide_sites.items():
        of = particles.log_q[name].shape
        mine = scale_and_mask(ones.new_ones(of), site["scale"], site["mask"])
        if not torch.equal(mine, scale.reshape(scale.shape[0], *[1] * (len(of) - 2), scale.shape[1]).expand(of)):
            raise ValueError(
                f"site {name!r} has another scale or mask than the text {text['name']!r}: only reverse_kl without a source "
                "is defined then"
            )
    texts = [name for name, site in particles.guide_sites.items() if is_sequence(site)]
    only = texts[0] if len(texts) == len(particles.guide_sites) == 1 else None

    def tokens(of: dict[str, Tensor]) -> Tensor | None:
        if only is None or of[only].shape[:-1].numel() != scale.numel():
            return None
        return of[only].double().reshape(*shape, -1) * inverse.unsqueeze(-1)

    terms = Terms(
        prompts=particles.prompts,
        log_prior=particles.log_prior() * inverse,
        log_likelihood=particles.log_evidence() * inverse,
        log_guide=particles.log_guide() * inverse,
        log_proposal=None if particles.proposal_log_q is None else particles.log_proposal(),
        estimate_log_z=estimate_log_z,
        baseline=baseline,
        max_ratio=max_ratio,
        clip_ratio=clip_ratio,
        token_log_prior=tokens(particles.token_log_p),
        token_log_guide=tokens(particles.token_log_q),
        token_log_proposal=None
        if particles.proposal_log_q is None or only is None
        else particles.proposal_log_q[only].reshape(*shape, -1),
        prefixes=None
        if only is None or particles.token_log_q[only].dim() != 3
        else lambda: _prefixes(particles, only, inverse),
    )
    return terms, scale


@torch.no_grad()
def _prefixes(particles: Particles, name: str, inverse: Float64[Tensor, "K B"]) -> Prefixes:
    """Runs the model once more on every prefix of the texts, for its likelihood; the networks score them in one pass."""
    site, twin = particles.guide_sites[name], particles.model_sites[name]
    if particles.subsampled() is not None:
        raise ValueError("subtb runs the model again, where a plate would subsample anew: use trajectory_balance")
    ones = torch.ones(site["value"].shape[:-1], dtype=torch.float64, device=site["value"].device)
    scales = [scale_and_mask(ones, s["scale"], s["mask"]).expand(ones.shape) for s in (site, twin)]
    if not torch.equal(*scales):
        raise ValueError("subtb needs the text under one scale in model and guide: use trajectory_balance")
    x, lm = site["value"], site["fn"].lm
    steps, vocabulary = x.shape[-1], lm.vocabulary
    count = (
        vocabulary.lengths(x)
        - vocabulary.is_end(x.gather(-1, (vocabulary.lengths(x) - 1).unsqueeze(-1))[..., 0]).long()
    )
    here, stop = torch.arange(steps, device=x.device), torch.arange(steps + 1, device=x.device)
    cut = stop.view(-1, 1, 1, 1)  # (T + 1, K, B, T): the text as it stands where it is no longer than the cut
    ended = torch.where(here == cut, vocabulary.end_ids[0], torch.where(here > cut, vocabulary.pad_id, x))
    texts = torch.where(count.unsqueeze(-1) > cut, ended, x)

    trace = Trace()
    trace.add_node(name, **{**site, "value": texts.flatten(0, 1)})
    rerun = sample_sites(particles.again(trace, len(stop) * particles.count))
    likelihood = [score_site(n, s, {}) for n, s in rerun.items() if s["is_observed"] and not is_record(s)]
    log_likelihood = by_prompt(likelihood, len(stop) * particles.count, len(particles.prompts)).unflatten(
        0, (-1, particles.count)
    )

    def outcomes(fn: TokenSequence) -> Float64[Tensor, "T1 K B"]:  # log-probability of each prefix and its end
        token, end = fn.token_and_end_log_probs(x)
        start = torch.nn.functional.pad(token.cumsum(-1), (1, 0))
        return (start + torch.nn.functional.pad(end, (0, 1))).movedim(-1, 0)

    log_weight = outcomes(particles.model_sites[name]["fn"]) - outcomes(site["fn"]) + log_likelihood * inverse
    return Prefixes(log_weight.movedim(0, -1), stop <= count.unsqueeze(-1))
