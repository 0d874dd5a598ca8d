"""`next_token_calibration`: whether texts have the law of a language model whose conditionals are known, token by token."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import scipy.stats
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.draws import TOGETHER, Draws
from ppl_lm.infer.traces.text_site import text_law

ROWS = 64  # texts at a time


@dataclass(frozen=True)
class NextTokenCalibration:
    """Over all prompts together:

    :param z: Σ (log q_t + H_t) / √Σ Var_t over all tokens, q_t = q(x_t | x_<t), H_t the entropy of that conditional and Var_t
        the variance of its log: near a standard normal if the texts are drawn from q. Above 0: they are more probable than q's
        own draws, as at a lower temperature; below 0: less.
    :param p_value: of |z|, two-sided.
    :param uniform_p_value: Kolmogorov-Smirnov, of the tokens' quantiles F_<(x_t) + V q_t, independent and uniform under q.
    :param num_tokens: that were compared, end tokens among them.
    """

    z: float
    p_value: float
    uniform_p_value: float
    num_tokens: int

    def __str__(self) -> str:
        uniform = f"uniform: p = {self.uniform_p_value:.3g}; {self.num_tokens:,} tokens"
        return f"z = {self.z:+.2f} (p = {self.p_value:.3g}), {uniform}"


@torch.no_grad()
def next_token_calibration(
    guide: Callable[..., Any], draws: Draws, name: str | None = None, seed: int = 0
) -> NextTokenCalibration:
    """Whether `draws` are draws from a guide's law, whose next-token conditionals are known: far sharper than `two_sample`,
    since it compares each token with what q expects at its place.

    :param guide: a program with one text a prompt: its law q. A posterior is no such law: its conditionals are not known.
    :param draws: that are said to be q's, independent: as `importance` made them, or exact.
    :param seed: of V; torch's random state is neither used nor changed.
    :raises ValueError: of resampled draws and Markov chains, and of weighted ones put under another guide (`under`).
    """
    if draws.kind in (*TOGETHER, "chains", "rescored"):
        raise ValueError(
            f"these draws are {draws.kind}, whose texts depend on each other or may do so; give independent ones, as drawn"
        )
    name = name or draws.text_site
    if name not in draws.texts:
        raise ValueError(f"name={name!r}, but the sites that are text are {list(draws.texts)}")
    if len(draws.texts) != 1 or draws[name].dim() != 4:
        raise ValueError(
            f"next_token_calibration is of one text a prompt; these draws have the texts {list(draws.texts)}"
        )
    law = text_law(guide, read_once(draws.prompts, guide))
    x = draws[name].flatten(0, 1)  # (S, B, T)
    generator = torch.Generator().manual_seed(seed)
    scores, variances, quantiles = [], [], []
    batch = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]).reshape(-1)
    for rows in torch.arange(len(batch), device=x.device).split(ROWS):
        score, variance, below, mass = _tokens(law, x.reshape(-1, x.shape[-1])[rows], batch[rows])
        u = torch.rand(below.shape, generator=generator, dtype=torch.float64).to(below.device)
        scores.append(score)
        variances.append(variance)
        quantiles.append(below + u * mass)
    total, spread, u = torch.cat(scores).sum(), torch.cat(variances).sum(), torch.cat(quantiles)
    z = float(total / spread.sqrt()) if float(spread) > 0 else 0.0
    uniform = float(scipy.stats.kstest(u.cpu().numpy(), "uniform").pvalue)
    return NextTokenCalibration(z, float(2 * scipy.stats.norm.sf(abs(z))), uniform, len(u))


def _tokens(law: Any, x: Int[Tensor, "N T"], rows: Int[Tensor, "N"]) -> tuple[Float64[Tensor, "M"], ...]:
    """Of each token of these texts log q_t + H_t, Var_t, F_<(x_t) and q_t.

    :raises ValueError: if q gives one of them no probability: the texts are not q's."""
    alive = law.lm.vocabulary.alive(x)
    log_q = law.lm.next_token_log_probs(law.prompts.take(rows), x).double().log_softmax(-1)  # (N, U, V)
    x, alive = x[:, : log_q.shape[1]], alive[:, : log_q.shape[1]]
    own = log_q.gather(-1, x.unsqueeze(-1))[..., 0][alive]
    if bool((own == -math.inf).any()):
        raise ValueError("one of the texts is impossible under the guide: they are not its draws")
    mass = log_q.exp()
    finite = log_q.masked_fill(mass == 0, 0.0)
    mean = (mass * finite).sum(-1)
    variance = (mass * finite.square()).sum(-1) - mean.square()
    below = (mass.cumsum(-1) - mass).gather(-1, x.unsqueeze(-1))[..., 0]
    return own - mean[alive], variance[alive], below[alive], own.exp()
