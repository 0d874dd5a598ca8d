"""Twists learned by different losses: each comes closest where it is what is minimised, and a learned twist makes SMC's
evidence sharp with few particles (Zhao et al. 2024, tables 2 to 4 in miniature)."""

from typing import Any

import torch
from jaxtyping import Float

from ppl_lm.experiments.lab import Result, measure, panels, train
from ppl_lm.experiments.misspecified import Bigram, palindrome
from ppl_lm.guides import twisted
from ppl_lm.infer.binding import Bound, bind
from ppl_lm.infer.objectives.divergences import forward_kl, reverse_kl
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.samplers.twist import Twist
from ppl_lm.infer.twists.fitting import fit_twist
from ppl_lm.infer.twists.functions import exact_twist
from ppl_lm.infer.twists.losses import ctl, fudge, log_variance, sixo, soft_rl
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.models import tilted

BETA, STEPS, PARTICLES, RATE = 0.25, 800, 128, 0.03
LOSSES = {"CTL": ctl, "SIXO": sixo, "soft RL": soft_rl, "FUDGE": fudge, "log-variance": log_variance}
OBJECTIVES = {"forward KL (DPG)": forward_kl, "reverse KL (KL-RL)": reverse_kl}
FEW, RUNS = 4, 400  # particles of the SMC that is to show what a twist is worth, and its runs


def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm = table_lm(5, 3, concentration=3.0, seed=seed)
    target = bind(tilted, lm, reward=palindrome, beta=BETA)
    positives = rejection(target, None, [""], num_samples=2000, log_bound=1 / BETA)
    rows: list[dict[str, Any]] = []
    learned = {}

    def add(name: str, posterior: str, twist: LanguageModel) -> None:
        figures = measure(target, bind(twisted, lm, twist), [""])
        rows.append(
            {"twist": name, "posterior texts": posterior, "KL(q‖p)": figures["KL(q‖p)"], "KL(p‖q)": figures["KL(p‖q)"]}
        )
        learned[name, posterior] = twist

    add("none", "", table_like(lm))
    for name, loss in LOSSES.items():
        for posterior, given in (("weighted", None), ("exact", positives)):
            if given is not None and loss not in (ctl, sixo):  # the others ask for none
                continue
            twist = table_like(lm, network=Bigram)
            fit_twist(
                target, twist, [""], loss=loss, steps=STEPS, num_samples=PARTICLES, learning_rate=RATE, positives=given
            )
            add(name, posterior, twist)
    for name, objective in OBJECTIVES.items():  # the same networks as guides
        twist = table_like(lm, network=Bigram)
        train(
            target, bind(twisted, lm, twist), [""], objective=objective, steps=STEPS, rate=RATE, num_particles=PARTICLES
        )
        add(name, "", twist)
    whole = table_like(lm)
    fit_twist(target, whole, [""], steps=STEPS, num_samples=PARTICLES, learning_rate=RATE)
    evidence = {
        "none": _log_z(target, None),
        "CTL, one token": _log_z(target, learned["CTL", "weighted"]),
        "CTL, all tokens": _log_z(target, whole),
        "exact": _log_z(target, exact_twist(target, [""]), candidates=lm.vocabulary.size),
    }
    spread = {name: float(values.std()) for name, values in evidence.items()}
    figure, (left, right) = panels(2)
    for row in rows:
        left.scatter(row["KL(q‖p)"], row["KL(p‖q)"], label=f"{row['twist']} {row['posterior texts']}".strip())
    left.set(xlabel="KL(twisted ‖ posterior) [nats]", ylabel="KL(posterior ‖ twisted) [nats]")
    left.legend(fontsize="x-small")
    right.boxplot([v.tolist() for v in evidence.values()])
    right.set_xticks(range(1, len(evidence) + 1), [name.replace(", ", ",\n") for name in evidence])
    right.set_ylabel(f"log Ẑ of {FEW} particles [nats]")
    by_name = {(row["twist"], row["posterior texts"]): row for row in rows}
    start, reverse = rows[0], by_name["reverse KL (KL-RL)", ""]
    fitted = rows[1:]
    covers = [row for row in fitted if row["twist"] in ("CTL", "SIXO", "FUDGE", "forward KL (DPG)")]
    others = [row for row in fitted if row not in covers]
    return Result(
        "Twists with the memory of one token, learned for palindromes",
        rows,
        {
            "every one is nearer to the posterior than no twist in KL(q‖p)": all(
                row["KL(q‖p)"] < start["KL(q‖p)"] for row in fitted
            ),
            "reverse KL has the smallest KL(q‖p), and pays with the largest KL(p‖q)": reverse["KL(q‖p)"]
            < min(row["KL(q‖p)"] for row in fitted if row is not reverse)
            and reverse["KL(p‖q)"] > max(row["KL(p‖q)"] for row in fitted if row is not reverse),
            "those that learn from posterior texts (CTL, SIXO, FUDGE, DPG) have the smallest KL(p‖q)": max(
                row["KL(p‖q)"] for row in covers
            )
            < min(row["KL(p‖q)"] for row in others),
            f"with a learned twist that can remember log Ẑ of {FEW} particles spreads half as much as with none": 2
            * spread["CTL, all tokens"]
            < spread["none"],
            "with the exact twist it is certain": spread["exact"] < 1e-6,
        },
        figure,
    )


def _log_z(target: Bound, twist: Twist | None, **settings: Any) -> Float[torch.Tensor, "runs"]:
    draws = smc(target, None, [""], num_samples=FEW, num_runs=RUNS, settings=SMCSettings(twist=twist, **settings))
    return draws.by_run().log_weight[0, :, 0]
