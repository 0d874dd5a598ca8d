"""Calibrated verdicts: guides that fail in known ways on random posteriors, and what `diagnose` says of each; how often the
bound that a good verdict states holds."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.criticism.diagnoses.diagnosis import diagnose
from ppl_lm.criticism.diagnoses.verdicts import CODES, GOOD_NATS, GOOD_SHARE
from ppl_lm.experiments.lab import Result, panels, train
from ppl_lm.guides import tabular
from ppl_lm.infer.binding import Bound, bind
from ppl_lm.infer.enumeration import enumerate_posterior, kl
from ppl_lm.infer.objectives.divergences import reverse_kl
from ppl_lm.infer.objectives.rl import expected_reward
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.models import tilted

TARGETS, DRAWS = 200, 2048
CLOSE = 0.1  # nats within which a guide has to be called good


@dataclass(frozen=True)
class Target:
    """A posterior by enumeration of its N texts: log p0, the log likelihood and the log posterior, (N,), nats."""

    model: Bound
    lm: LanguageModel
    x: Int[Tensor, "N T"]
    log_prior: Float[Tensor, "N"]
    log_likelihood: Float[Tensor, "N"]
    log_p: Float[Tensor, "N"]

    @staticmethod
    def random(generator: torch.Generator, sizes: tuple[int, int], lengths: tuple[int, int]) -> "Target":
        """A prior whose next tokens have Dirichlet laws, and a reward with a part for each token and one for each text."""

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        def integer(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        size, length = integer(*sizes), integer(*lengths)
        lm = table_lm(size, length, concentration=math.exp(uniform(-1, 1)), seed=integer(0, 2**31))
        part = torch.randn(length, size, generator=generator, dtype=torch.float64)
        noise, share = torch.randn(997, generator=generator, dtype=torch.float64), uniform(0, 1)

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            values = []
            for ids in completion_ids:
                linear = sum(float(part[t, v]) for t, v in enumerate(ids)) / length**0.5
                code = sum((v + 1) * (size + 1) ** t for t, v in enumerate(ids)) % 997
                values.append(math.tanh(share * linear + (1 - share) * float(noise[code])))
            return values

        model = bind(tilted, lm, reward=reward, beta=math.exp(uniform(math.log(0.2), math.log(1.0))))
        truth = enumerate_posterior(model, bind(tabular, lm.copy()), [""])
        assert truth.log_q is not None
        log_prior = truth.log_q[:, 0].detach()
        log_joint = truth.log_joint[:, 0].detach()
        x = truth.latents["x"][:, 0]
        return Target(model, lm, x, log_prior, log_joint - log_prior, truth.log_posterior[:, 0].detach())

    def guide(self, log_q: Float[Tensor, "N"]) -> Bound:
        """With this law over texts, nats, as a table of next tokens."""
        lm = table_like(self.lm)
        start = self.lm.prompts([""]).ids.expand(len(self.x), 1)
        before = torch.cat([start, self.x[:, :-1]], 1)
        network: Any = lm.model
        rows = network.rows(before, torch.ones_like(before))
        alive = lm.vocabulary.alive(self.x)
        mass = torch.zeros_like(network.table)
        share = log_q.softmax(0).unsqueeze(-1).expand_as(rows)
        mass.index_put_((rows[alive], self.x[alive]), share[alive], accumulate=True)
        unused = mass.sum(-1, keepdim=True) == 0
        with torch.no_grad():
            network.table.copy_(torch.where(unused, 0.0, mass).log().where(~unused, torch.zeros_like(mass)))
        return bind(tabular, table=lm)


def collapsed(target: Target, generator: torch.Generator) -> Bound:
    """Trained on expected reward alone, by standard RL."""
    guide = bind(tabular, table=target.lm.copy())
    train(target.model, guide, [""], objective=expected_reward, steps=150, rate=0.3, num_particles=32, every=10**6)
    return guide


def honest(target: Target, generator: torch.Generator) -> Bound:
    """Fitted by reverse KL for a few steps or for many."""
    guide = bind(tabular, table=target.lm.copy())
    steps = int(torch.randint(40, 250, (), generator=generator))
    train(target.model, guide, [""], objective=reverse_kl, steps=steps, rate=0.1, num_particles=32, every=10**6)
    return guide


def dropped_mode(target: Target, generator: torch.Generator) -> Bound | None:
    """The posterior without the texts that have some token at some place, 10% to 60% of its mass."""
    width, places = target.lm.vocabulary.size, target.x.shape[1]
    order = torch.randperm(width * places, generator=generator).tolist()
    for code in order:
        mode = target.x[:, code // width] == code % width
        if 0.1 < float(target.log_p.exp()[mode].sum()) < 0.6:
            return target.guide(target.log_p.masked_fill(mode, -torch.inf))
    return None


def truncated(target: Target, generator: torch.Generator) -> Bound | None:
    """The posterior on its likeliest texts alone, without 10% to 50% of its mass."""
    keep = 0.5 + 0.4 * float(torch.rand((), generator=generator))
    order = target.log_p.argsort(descending=True)
    last = max(2, int((target.log_p[order].exp().cumsum(0) < keep).sum()))  # of one text alone it would be a collapse
    if float(target.log_p[order[last + 1 :]].exp().sum()) < 0.1:
        return None
    log_q = torch.full_like(target.log_p, -torch.inf)
    log_q[order[: last + 1]] = target.log_p[order[: last + 1]]
    return target.guide(log_q)


def temperature(target: Target, generator: torch.Generator) -> Bound | None:
    """p^(1/τ) for the first τ of a random order at which it is clearly too far, and still nearer than the prior."""
    choices = torch.tensor([0.5, 0.6, 0.7, 1.4, 1.7, 2.0, 2.5])
    was = float(kl(target.log_prior, target.log_p))
    for tau in choices[torch.randperm(len(choices), generator=generator)].tolist():
        log_q = (target.log_p / tau).log_softmax(0)
        if 2 * max(GOOD_NATS, GOOD_SHARE * was) < float(kl(log_q, target.log_p)) < 0.8 * was:
            return target.guide(log_q)
    return None


def pushed_away(target: Target, generator: torch.Generator) -> Bound:
    """The prior tilted against the reward."""
    much = 0.3 + 0.7 * float(torch.rand((), generator=generator))
    return target.guide(target.log_prior - much * target.log_likelihood)


PLANTED: dict[str, tuple[str, Callable[[Target, torch.Generator], Bound | None]]] = {
    "fitted by reverse KL": ("good", honest),
    "trained on reward alone": ("collapsed", collapsed),
    "a mode dropped": ("misses_mass", dropped_mode),
    "support truncated": ("misses_mass", truncated),
    "wrong temperature": ("poor", temperature),
    "tilted the wrong way": ("worse_than_prior", pushed_away),
}


def judged(
    seed: int, targets: int, sizes: tuple[int, int] = (3, 6), lengths: tuple[int, int] = (3, 5)
) -> Iterator[dict[str, Any]]:
    """One row for each target and guide: what was planted, what `diagnose` said, the bound and the truth."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(targets):
        target = Target.random(generator, sizes, lengths)
        for planted, (_, make) in PLANTED.items():
            torch.manual_seed(seed * 1_000_003 + number)
            guide = make(target, generator)
            if guide is None:  # this posterior has no such failure
                continue
            truth = enumerate_posterior(target.model, guide, [""])
            diagnosis = diagnose(target.model, guide, [""], DRAWS)
            figures = diagnosis.average
            yield {
                "target": number,
                "planted": planted,
                "code": diagnosis.verdict.code,
                "kl": float(truth.kl_q_p.detach()),
                "bound": figures.kl_q_p + 2 * figures.kl_q_p_se,
            }


def run(seed: int) -> Result:
    rows = list(judged(seed, TARGETS))
    table = []
    for planted, (wanted, _) in PLANTED.items():
        mine = [row for row in rows if row["planted"] == planted]
        counts = {code: sum(row["code"] == code for row in mine) for code in CODES}
        table.append({"planted": planted, "should be": wanted, "guides": len(mine), **counts})
    good = [row for row in rows if row["code"] == "good"]
    close = [row for row in rows if row["kl"] < CLOSE]
    holds = sum(row["kl"] <= row["bound"] for row in good) / max(1, len(good))
    called = sum(row["code"] == "good" for row in close) / max(1, len(close))
    figure, (left, right) = panels(2)
    left.imshow([[row[code] / max(1, row["guides"]) for code in CODES] for row in table], cmap="Blues", vmin=0, vmax=1)
    left.set_xticks(range(len(CODES)), CODES, rotation=40, ha="right")
    left.set_yticks(range(len(table)), [row["planted"] for row in table])
    right.scatter([max(row["kl"], 1e-4) for row in good], [row["bound"] for row in good], s=8)
    right.axline((0, 0), slope=1, color="black", linewidth=1)
    right.set(xlabel="KL(guide ‖ posterior), by enumeration [nats]", ylabel="stated bound of a good verdict [nats]")
    return Result(
        f"Verdicts on guides for {TARGETS} random posteriors; of {len(good)} called good, {holds:.1%} are within the stated "
        f"bound; of {len(close)} within {CLOSE} nats, {called:.1%} are called good",
        table,
        {
            "whenever it says good, KL(guide ‖ posterior) is within the stated bound in at least 95%": holds >= 0.95,
            f"of guides within {CLOSE} nats at least 80% are called good": called >= 0.8,
            **{
                f"{row['planted']}: {row['should be']} in at least 90%": row[row["should be"]]
                >= 0.9 * row["guides"]
                > 0
                for row in table
                if row["should be"] != "good"
            },
        },
        figure,
    )
