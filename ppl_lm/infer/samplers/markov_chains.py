"""Markov chains over text: Metropolis-Hastings with proposals from a guide."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import Draws, NoSupportError, concatenate
from ppl_lm.infer.samplers.chances import accepted, either
from ppl_lm.infer.samplers.importance_sampling import draw, require_prompts
from ppl_lm.infer.samplers.importance_sampling import require_support as require_whole
from ppl_lm.infer.samplers.in_pieces import Progress
from ppl_lm.infer.samplers.kernels import Kernel, Propose, suffix
from ppl_lm.infer.traces.structure import nesting_of

CLAIM = "a Markov chain tends to the whole posterior"


@dataclass(frozen=True)
class Info:
    """What became of one proposal for each of N chains and B prompts.

    :param log_accept: log α, at most 0, nats, (N, B); (N, 1) where all prompts are accepted together.
    """

    proposal: Draws
    log_accept: Float[Tensor, "N B"]
    accepted: Bool[Tensor, "N B"]


@torch.no_grad()
def step(state: Draws, propose: Propose) -> tuple[Draws, Info]:
    """One step of Metropolis-Hastings of N chains, (1, N, B), each prompt by itself where it has a weight of its own.

    A state that is impossible under the posterior is always left."""
    proposal, correction = propose(state)
    log_ratio = proposal.log_weight[0] - state.log_weight[0] + correction
    log_accept = torch.where(state.log_weight[0] == -torch.inf, 0.0, log_ratio).clamp_max(0.0)
    taken = accepted(log_accept)
    return replace(either(state, proposal, taken), cost=proposal.cost), Info(proposal, log_accept, taken)


@torch.no_grad()
def mcmc(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    prompts: Any,
    *,
    num_samples: int = 1000,
    warmup: int = 100,
    num_chains: int = 32,
    kernel: Kernel = suffix,
    max_plate_nesting: int | None = None,
    on_progress: Progress | None = None,
) -> Draws:
    """Markov chains whose law tends to the posterior, all run side by side, each from a draw of the guide.

    Whether they have come there is for `az.summary(to_arviz(draws))` to say: R-hat near 1, and how many independent draws
    they are worth. `stats["acceptance_rate"]` is each step's α.

    :param guide: proposes; None proposes from the model's own prior.
    :param num_samples: of each chain, after `warmup` further steps.
    :param kernel: `suffix`, `independence` or `particle_gibbs()`, or any function of that signature.
    :param on_progress: called after each step with the share that is done, 0 to 1, and words.
    :raises NoSupportError: if a chain has met no possible text by the end of its warm-up.
    :raises ValueError: if the guide is truncated: chains would never leave its support.
    """
    require_count("num_samples", num_samples)
    require_count("warmup", warmup, 0)
    require_count("num_chains", num_chains, 2)  # R-hat compares chains
    prompts = read_once(prompts, model, guide)
    require_prompts(prompts)
    nesting = nesting_of(max_plate_nesting, model, guide, prompts)
    propose = kernel(model, guide, prompts, nesting)
    state = draw(model, guide, prompts, num_chains, nesting)
    require_whole(not state.lacks_support, CLAIM)
    cost, kept, rates = state.cost, [], []
    for i in range(warmup + num_samples):
        if i == warmup:
            require_support(state)
        state, info = step(state, propose)
        cost = cost + state.cost
        if i >= warmup:
            kept.append(state)
            rates.append(info.log_accept.exp())
        if on_progress is not None:
            words = f"step {i + 1} of {warmup + num_samples}, {float(info.log_accept.exp().mean()):.0%} accepted"
            on_progress((i + 1) / (warmup + num_samples), words)
    chains = concatenate([s.map(lambda v: v.transpose(0, 1)) for s in kept])  # (N, S, B)
    return replace(chains, cost=cost, kind="chains", stats={"acceptance_rate": torch.stack(rates, 1)})


def require_support(state: Draws) -> None:
    """:raises NoSupportError: if a chain, of (1, N, B), stands at a text that is impossible under the posterior."""
    best = state.log_weight[0].max(0)
    if bool((state.log_weight == -torch.inf).any()):
        worst = int(best.values.argmin())
        raise NoSupportError(
            f"prompt {worst}: chains have met no possible text (the best log weight is {float(best.values[worst]):.2f} "
            "nats); raise warmup, or use a guide closer to the posterior"
        )
