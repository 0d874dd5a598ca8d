"""`two_sample`: whether two sets of independent texts can have the same law, by a kernel that compares strings."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import TOGETHER, Draws

ORDERS = (1, 2, 3)
SAME = 0.1  # what the kernel adds for equal texts: without it different laws may have equal n-grams
MOST = 2_000  # draws of each side that are compared: the kernel's table is the square of their number


@dataclass(frozen=True)
class TwoSample:
    """For each of B prompts:

    :param p_value: the share of random divisions of all texts into two such sets whose statistic is not below the observed one,
        that one counted among them: at most α with probability at most α if the laws are equal.
    :param mmd2: unbiased estimate of the squared maximum mean discrepancy, no unit; 0 for equal laws, and below it by chance.
    :param num_draws: texts of the first and of the second set.
    :param blind_below: nats. If KL(first ‖ second) is less, no test whatever with so many draws and α = 0.05 finds the
        difference with a chance of one half: by Pinsker its power is at most α + √(num_draws · KL / 2). This one needs more.
    """

    p_value: Float64[Tensor, "B"]
    mmd2: Float64[Tensor, "B"]
    num_draws: tuple[int, int]
    blind_below: float

    def __str__(self) -> str:
        rows = [f"p = {p:.3f}, MMD² = {v:.2e}" for p, v in zip(self.p_value.tolist(), self.mmd2.tolist(), strict=True)]
        m, n = self.num_draws
        return f"{'; '.join(rows)} ({m} and {n} draws; blind to a KL below {self.blind_below:.2g} nats)"


def two_sample(
    draws: Draws, exact: Draws, num_permutations: int = 999, name: str | None = None, seed: int = 0
) -> TwoSample:
    """Tests of each prompt whether the texts of `draws` have the law of those of `exact`: a maximum mean discrepancy under a
    kernel of strings with a permutation p-value (Gretton et al. 2012).

    The kernel is the cosine between counts of 1-, 2- and 3-grams of tokens, a text's begin and end among them, plus 0.1
    for equal texts. Weights are not used: a guide's draws are tested as what they are, the guide's law.

    What it cannot see: laws that differ by less than `blind_below`, and far more than that where they differ in no common
    n-gram, such as a posterior at another β. Where the conditionals of a law are known `next_token_calibration` sees more.

    :param draws: independent ones: a guide's (`importance`), or exact.
    :param exact: exact posterior draws, or others to compare with; at least two on each side.
    :param num_permutations: random divisions.
    :param name: of the site that is text; None: `x`, or the first.
    :param seed: of the divisions; torch's random state is neither used nor changed.
    :raises ValueError: of resampled draws and Markov chains, whose texts are not independent: the p-value would be too small.
    """
    require_count("num_permutations", num_permutations)
    sides = [_texts(each, what, name) for each, what in ((draws, "draws"), (exact, "exact"))]  # (B, S, T) each
    draws.prompts.vocabulary.require_same(exact.prompts.vocabulary, "the draws and the exact ones")
    if len(sides[0]) == len(sides[1]) and draws.prompts.identities() != exact.prompts.identities():
        raise ValueError("the draws are of other prompts than the exact ones")
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"the draws are of {len(sides[0])} and {len(sides[1])} prompts; give the same prompts on both sides"
        )
    random = np.random.default_rng(seed)
    first = sides[0].shape[1]
    p_values, statistics = [], []
    for rows in zip(*sides, strict=True):
        texts = [tuple(row) for side in rows for row in draws.prompts.vocabulary.completion_ids(side)]
        kernel = string_kernel(texts)
        picks = np.argsort(random.random((num_permutations, len(texts))), axis=1)[:, :first]
        seen = mmd2(kernel, np.arange(first)[None])[0]
        others = mmd2(kernel, picks)
        p_values.append((1 + int((others >= seen - 1e-12).sum())) / (num_permutations + 1))
        statistics.append(seen)
    return TwoSample(
        torch.tensor(p_values, dtype=torch.float64),
        torch.tensor(statistics, dtype=torch.float64),
        (first, sides[1].shape[1]),
        2 * (0.5 - 0.05) ** 2 / first,
    )


def _texts(draws: Draws, what: str, name: str | None) -> Int[Tensor, "B S T"]:
    if draws.kind in (*TOGETHER, "chains", "rescored"):
        raise ValueError(
            f"{what}= holds {draws.kind}, whose texts depend on each other or may do so: a test that takes them for "
            "independent finds differences that are not there. Give exact draws, or a guide's own (importance), as drawn"
        )
    name = name or draws.text_site
    if name not in draws.texts:
        raise ValueError(f"name={name!r}, but the sites of {what}= that are text are {list(draws.texts)}")
    x = draws[name].cpu()
    if x.dim() != 4:
        raise ValueError(f"site {name!r} has several texts a prompt; two_sample compares one")
    x = x.flatten(0, 1).transpose(0, 1)[:, :MOST]
    if x.shape[1] < 2:
        raise ValueError(f"{what}= holds one draw; give at least 2")
    return x


def string_kernel(texts: Sequence[tuple[Hashable, ...]]) -> Float[np.ndarray, "N N"]:
    """cos(1- to 3-gram counts, with a mark at both ends) + 0.1 · 1[equal], float64."""
    column: dict[tuple[Hashable, ...], int] = {}
    rows, columns = [], []
    for i, text in enumerate(texts):
        marked = ("begin", *text, "end")
        for n in ORDERS:
            for j in range(len(marked) - n + 1):
                rows.append(i)
                columns.append(column.setdefault(marked[j : j + n], len(column)))
    counts = scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), len(column)))
    lengths = np.sqrt(np.asarray(counts.multiply(counts).sum(1)).ravel())
    scaled = scipy.sparse.diags(1 / lengths) @ counts
    number: dict[tuple[Hashable, ...], int] = {}
    of = np.array([number.setdefault(text, len(number)) for text in texts])
    cosine: Any = scaled @ scaled.T
    return cosine.toarray() + SAME * (of[:, None] == of)


def mmd2(kernel: Float[np.ndarray, "N N"], first: Int[np.ndarray, "P m"]) -> Float[np.ndarray, "P"]:
    """Unbiased MMD² between the rows `first` and all others, for each of P divisions."""
    off = kernel - np.diag(np.diag(kernel))
    inside = np.zeros((len(first), len(kernel)))
    np.put_along_axis(inside, first, 1.0, 1)
    m, n = first.shape[1], len(kernel) - first.shape[1]
    toward = inside @ off
    within, all_ = (toward * inside).sum(1), toward.sum(1)
    total = off.sum()
    between, beyond = all_ - within, total - 2 * all_ + within
    return within / (m * (m - 1)) + beyond / (n * (n - 1)) - 2 * between / (m * n)
