"""`mbar`: normalising constants of many laws from draws of some of them, all used together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from ppl_lm.infer.draws import Draws

LEAST_OVERLAP = 0.05  # of neighbours: with less their ratio is not known, whatever the formula says
TOLERANCE = 1e-12
MOST = 10_000  # rounds


@dataclass(frozen=True)
class StateConstants:
    """:param log_z: log Z_j - log Z_0 of each state, nats.
    :param covariance: of these; `log_z_se` is the root of its diagonal.
    :param overlap: of each sampled state with the next: ∫ 2 p_k p_{k+1} / (p_k + p_{k+1}), 1 for equal laws, 0 for disjoint
        ones.
    """

    log_z: Float64[Tensor, "J"]
    covariance: Float64[Tensor, "J J"]
    overlap: Float64[Tensor, "L"]

    @property
    def log_z_se(self) -> Float64[Tensor, "J"]:
        return self.covariance.diagonal().clamp_min(0.0).sqrt()


def mbar(log_density: Float64[Tensor, "J N"], counts: Sequence[float]) -> StateConstants:
    """The multistate Bennett acceptance ratio (Shirts & Chodera 2008):

        Z_j = Σ_n p_j(x_n) / Σ_k N_k p_k(x_n) / Z_k,  Z_0 = 1,

    with the covariance of log Z from the singular values of the weights (their eq. D6). It is for independent draws; of chains
    give N_k divided by their statistical inefficiency as `counts`, with all draws in `log_density`.

    :param log_density: of all N draws, whichever law they are from, under each of J laws, up to Z_j, nats; -inf where
        impossible. A law of which there is no draw may stand among them: an event r ≥ c is one, with 0 where it holds and -inf
        elsewhere.
    :param counts: N_k of each law, 0 of those without draws; the first has some.
    :raises ValueError: if neighbours among the sampled laws do not overlap, or a law has no weight at all.
    """
    n = torch.as_tensor(counts, dtype=torch.float64, device=log_density.device)
    if n.shape != log_density.shape[:1] or not bool(n[0] > 0):
        raise ValueError(f"counts={list(counts)} for {len(log_density)} laws; give one for each, the first above 0")
    if bool((log_density == -math.inf).all(1).any()):
        raise ValueError(
            "no draw is possible under one of the laws: its probability is known to be small, and no more than that"
        )
    u, sampled = log_density.double(), n > 0
    log_z = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    log_n = n[sampled].log().unsqueeze(-1)
    for _ in range(MOST):
        denominator = (log_n + u[sampled] - log_z[sampled].unsqueeze(-1)).logsumexp(0)  # (N,)
        new = (u - denominator).logsumexp(1)
        new = new - new[0]
        done = bool((new - log_z).abs().max() < TOLERANCE * (1 + float(new.abs().max())))
        log_z = new
        if done:
            break
    else:
        raise ValueError(f"the equations were not solved in {MOST:,} rounds: the laws hardly overlap, put more between")
    w = (u - log_z.unsqueeze(-1) - (log_n + u[sampled] - log_z[sampled].unsqueeze(-1)).logsumexp(0)).exp().T  # (N, J)
    return StateConstants(log_z, _covariance(w, n), _overlap(w[:, sampled]))


def path_constants(draws: Draws, levels: Sequence[float] = ()) -> list[StateConstants]:
    """Of each prompt, from all the texts that `annealed_smc` met on its path: log Z at each of its powers, the last of them
    that of the posterior, and then log P(log-likelihood ≥ level) under the prior for each level, nats. Texts of a run depend
    on each other, at one stage and from stage to stage, so the covariance is not `mbar`'s but the jackknife's over runs.

    :param levels: of the log-likelihood, nats: for `tilted` of reward / β.
    :raises ValueError: of other draws, of one run, and as `mbar`."""
    if "path_log_likelihood" not in draws.stats:
        raise ValueError("these draws came along no path; give annealed_smc's")
    met = draws.stats["path_log_likelihood"].double()  # (C, N, B, K)
    if len(met) < 2:
        raise ValueError("one run does not tell how far runs differ; give num_runs of at least 2")
    found = []
    for b, power in enumerate(draws.stats["power"][0, 0].double()):
        whole = _of_runs(met[:, :, b], power, levels)
        runs = range(len(met))
        others = torch.stack([_of_runs(met[[r for r in runs if r != out], :, b], power, levels).log_z for out in runs])
        apart = others - others.mean(0)
        covariance = (len(met) - 1) / len(met) * apart.T @ apart
        found.append(replace(whole, covariance=covariance))
    return found


def _of_runs(met: Float64[Tensor, "C N K"], power: Float64[Tensor, "K"], levels: Sequence[float]) -> StateConstants:
    log_l = met.permute(2, 0, 1).flatten()
    events = [torch.where(log_l >= level, 0.0, -math.inf).double().unsqueeze(0) for level in levels]
    counts = [float(met[..., 0].numel())] * len(power) + [0.0] * len(events)
    u = power.unsqueeze(-1)  # at u = 0 a text of likelihood 0 is as likely as the prior has it
    return mbar(torch.cat([torch.where(u == 0, 0.0, u * log_l), *events]), counts)


def _covariance(w: Float64[Tensor, "N J"], n: Float64[Tensor, "J"]) -> Float64[Tensor, "J J"]:
    """Of log Z_j - log Z_0."""
    _, s, vh = torch.linalg.svd(w, full_matrices=False)
    v = vh.T
    inner = torch.eye(len(s), dtype=w.dtype, device=w.device) - s.unsqueeze(-1) * (v.T @ (n.unsqueeze(-1) * v)) * s
    theta = v @ (s.unsqueeze(-1) * torch.linalg.pinv(inner, hermitian=True, rtol=1e-10) * s) @ v.T
    return theta - theta[:1] - theta[:, :1] + theta[0, 0]


def _overlap(w: Float64[Tensor, "N K"]) -> Float64[Tensor, "L"]:
    """:raises ValueError: if a pair of neighbours has too little."""
    a, b = w[:, :-1], w[:, 1:]
    shared = (2 * a * b / (a + b).clamp_min(1e-300)).sum(0)
    if len(shared) and float(shared.min()) < LEAST_OVERLAP:
        k = int(shared.argmin())
        raise ValueError(
            f"the sampled laws {k} and {k + 1} hardly overlap ({float(shared[k]):.3f}): what lies between them is not "
            f"known. Put "
            "more laws between"
        )
    return shared
