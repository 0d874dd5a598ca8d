"""The order of resampled draws: one by which ArviZ's effective sample sizes and Monte Carlo errors are those of the weights."""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.criticism.effective_size import moments
from ppl_lm.criticism.statistics import scalars
from ppl_lm.infer.draws import EQUAL, TOGETHER, Draws

ORDERS = 300  # that are tried at most, and fewer of many draws
WORK = 1_000_000  # draws that all of these have together
CLOSE = 0.08  # on the log scale: near enough
MOVED = 0.05  # share of the blocks that change places from one order to the next
NUMBERS = 6  # of each prompt, that an order is judged by
LEAST = 20  # draws, below which ArviZ's estimates say nothing


def arranged(draws: Draws, picks: Int[Tensor, "N B"]) -> Int[Tensor, "N B"]:
    """The same picks of each prompt (`Draws.reweighted`) in another order; those of exact draws and chains as they are.

    Copies of a draw stand together, as the states of a Markov chain do that stays where it is. Then the autocorrelation of a
    draw's k copies is (k - t)/k at lag t, and ArviZ's effective sample size is N²/Σk², the weights' own; apart from each other,
    copies would count as draws of their own. Runs that grew together by resampling stand together, too. Independent draws, or
    runs, may stand in any order, and means over them do not change with it; but ArviZ's estimate has an error of its own,
    a fifth or more where weights are heavy. So of several random orders that one is taken whose `ess_bulk` and `mcse_mean` are
    nearest to what the weights themselves say of the draws' numbers (`expectation`): var/se², of the ranks' normal scores for
    the former."""
    if draws.kind in EQUAL or len(picks) < LEAST:
        return picks
    columns = [_arranged(draws.of_prompt(b), picks[:, b]) for b in range(picks.shape[1])]
    return torch.stack(columns, 1)


def _arranged(draws: Draws, picks: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    picks = picks.sort().values
    blocks = picks // draws.log_guide.shape[1] if draws.kind in TOGETHER else picks
    block = blocks.unique(return_inverse=True)[1].numpy()
    rows, targets, importance = _judges(draws, picks)
    generator = np.random.default_rng(0)
    place = generator.permutation(block.max() + 1)

    def tried(place: np.ndarray) -> tuple[float, np.ndarray]:
        order = np.argsort(place[block], kind="stable")
        return float(np.max(importance * np.abs(np.log(ess_of_rows(rows[:, order]) / targets)), initial=0.0)), order

    distance, best = tried(place)
    for _ in range(min(ORDERS, WORK // len(picks))):
        if distance <= CLOSE or len(place) < 4:
            break
        moved = generator.choice(len(place), max(2, round(MOVED * len(place))), replace=False)
        other = place.copy()
        other[moved] = place[generator.permutation(moved)]
        found, order = tried(other)
        if found < distance:
            distance, best, place = found, order, other
    return picks[torch.as_tensor(best)]


def _judges(draws: Draws, picks: Int[Tensor, "N"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of numbers of one prompt's picked draws, and of their normal scores, which are what ArviZ's bulk size is of, (V, N);
    the effective size that each should have, and how much it counts, (V,): that of a mean half, as in its error."""
    share = draws.weights.cpu().flatten()
    rows, targets, importance = [], [], []
    for value in scalars(draws).values():
        for column in value.cpu().flatten(2).unbind(-1)[: NUMBERS - len(rows) // 2]:
            picked = column.flatten()[picks]
            for row, judged, much in (
                (picked.numpy(), column, 0.5),
                (_scores_of(picked), _normal_scores(column, share), 1.0),
            ):
                size = float(moments(draws, judged.unsqueeze(-1).to(share)).ess)
                if 0 < size < math.inf and row.min() < row.max():
                    rows.append(row)
                    targets.append(min(size, len(picks)))
                    importance.append(much)
    return np.stack(rows) if rows else np.zeros((0, len(picks))), np.array(targets), np.array(importance)


def _scores_of(values: Float[Tensor, "N"]) -> np.ndarray:
    return _normal_scores(values.unsqueeze(0), torch.full((len(values),), 1 / len(values), dtype=torch.float64))[
        0
    ].numpy()


def _normal_scores(values: Float[Tensor, "C S"], share: Float[Tensor, "N"]) -> Float[Tensor, "C S"]:
    """Of each value the normal quantile at its rank in the weighted law, ties in the middle."""
    which = values.flatten().unique(return_inverse=True)[1]
    mass = torch.zeros(int(which.max()) + 1, dtype=share.dtype).scatter_add(0, which, share)
    middle = (mass.cumsum(0) - mass / 2).clamp(1e-6, 1 - 1e-6)
    return torch.special.ndtri(middle)[which].reshape(values.shape)


def ess_of_rows(rows: np.ndarray) -> np.ndarray:
    """Effective sample size of the mean of each row, (V, N) -> (V,), as ArviZ finds it of one chain: split in halves, Geyer's
    initial monotone sequence of autocorrelations (Vehtari et al. 2021), up to a few hundredths. All rows at once, since
    hundreds of orders are tried."""
    half = rows.shape[1] // 2
    halves = np.stack([rows[:, :half], rows[:, -half:]], 1)  # (V, 2, N/2)
    means = halves.mean(-1, keepdims=True)
    spectrum = np.fft.rfft(halves - means, 2 * half)
    covariance = np.fft.irfft(spectrum * spectrum.conj(), 2 * half)[..., :half].mean(1) / half  # (V, N/2) by lag
    within = covariance[:, :1] * half / (half - 1)
    total = covariance[:, :1] + means[..., 0].var(1, ddof=1, keepdims=True)
    rho = 1 - (within - covariance) / total
    rho[:, 0] = 1.0
    pairs = rho[:, : half // 2 * 2].reshape(len(rows), half // 2, 2).sum(-1)
    kept = np.where(np.logical_and.accumulate(pairs > 0, 1), pairs, 0.0)
    tau = 2 * np.minimum.accumulate(kept, 1).sum(1) - 1
    return 2 * half / np.maximum(tau, 1 / np.log10(2 * half))
