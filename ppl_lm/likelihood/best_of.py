"""`BestOfN`: best-of-n sampling as a reward whose posterior is its law."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.token_sequence import TokenSequence

CHUNK = 256  # reference texts drawn at a time


class BestOfN(Reward):
    """log of how much likelier a text is as the best of n draws of the prior than as a single one, nats:

        log [(F(r)^n - F_(r)^n) / (F(r) - F_(r))],

    F and F_ being the shares of the prior's texts with a reward of at most, and of less than, r. It needs no unit for the
    reward, only an order. Best-of-n is KL-regularised RL with this reward at β = 1 (Sessa et al. 2024, BOND; up to a
    constant, their r_BOND over β_BOND), so

        bind(tilted, prior, reward=BestOfN(reward, prior, n=8), beta=1.0)

    is the law of the best of 8, ties broken at random, and whatever fits a posterior distils it into a guide.

    F is known from `num_references` draws of the prior for each prompt, made when it is first seen, and the text itself: the
    posterior is that of the best of n among these, for the whole life of this object.

    :param reward: as for `Reward`; higher is better.
    :param prior: the language model whose draws are ranked.
    :param n: at least 2.
    :param seed: of the references, which leave the global random state alone.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        prior: Callable[[Prompts], TokenSequence],
        n: int,
        num_references: int = 1024,
        timeout: float | None = None,
        seed: int = 0,
    ):
        if not isinstance(n, int) or n < 2:
            raise ValueError(f"n={n}; give a whole number: the best of fewer than 2 is the prior itself")
        if num_references < n:
            raise ValueError(f"num_references={num_references}; give at least n={n} draws to rank a text among")
        super().__init__(reward, timeout=timeout)
        self.inner = Reward(reward, timeout=timeout)
        self.prior, self.n, self.num_references, self.seed = prior, n, num_references, seed
        self.name, self.r_max = f"best_of_{n}({self.inner.name})", math.log(n)  # at the very top F = 1
        self.references: dict[tuple[Any, ...], Tensor] = {}

    def _scored(self, prompts: Prompts, x: Int[Tensor, "*#S T"], shape: torch.Size) -> Float64[Tensor, "*S"]:
        rewards = self.inner.score(prompts, x)
        batch, prompts = prompts.batch_shape, prompts.flatten()
        keys = torch.arange(math.prod(batch)).reshape(batch).expand(rewards.shape).reshape(-1)
        flat, log_ratios = rewards.reshape(-1), torch.empty(rewards.numel(), dtype=torch.float64, device=rewards.device)
        for b in range(math.prod(batch)):
            known, mine = self._of_prompt(prompts, b), (keys == b).to(rewards.device)
            below = torch.searchsorted(known, flat[mine], right=False).double()  # how many are less; right: at most
            upto = torch.searchsorted(known, flat[mine], right=True).double() + 1  # the text itself is one of them
            log_ratios[mine] = log_ratio(below / (len(known) + 1), upto / (len(known) + 1), self.n)
        return log_ratios.reshape(rewards.shape)

    @torch.no_grad()
    def _of_prompt(self, prompts: Prompts, b: int) -> Float64[Tensor, "N"]:
        """Rewards of the prior's draws for prompt b, sorted."""
        one = prompts.take(torch.tensor([b]))
        (key,) = one.identities()
        if key not in self.references:
            law, scores, device = self.prior(one), [], one.ids.device
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(hash((self.seed, *key[0])) % 2**63)
                for start in range(0, self.num_references, CHUNK):
                    draws = law.sample(torch.Size((min(CHUNK, self.num_references - start),)))
                    scores.append(self.inner.score(one, draws).flatten())
            self.references[key] = torch.cat(scores).sort().values
        return self.references[key]


def log_ratio(below: Float64[Tensor, "*S"], upto: Float64[Tensor, "*S"], n: int) -> Float64[Tensor, "*S"]:
    """log [(upto^n - below^n) / (upto - below)] = (n - 1) log upto + log Σ_i (below/upto)^i, i from 0 to n - 1."""
    powers = (below / upto).unsqueeze(-1) ** torch.arange(n, dtype=torch.float64, device=below.device)
    return (n - 1) * upto.log() + powers.sum(-1).log()
