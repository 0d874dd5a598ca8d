"""The numbers behind the plots, read from their Axes, against enumeration and brute force; odd input and untrusted text.

| what | property | tolerance |
|---|---|---|
| frontier | KL and E[reward] of p_β by enumeration | 4 of the standard errors, which the spread of 200 repetitions confirms |
| tail of weights | share of draws at least so heavy; scale of a known Pareto | 1e-12; 5% |
| steps of SMC | each curve is `draws.stats`; log Ẑ so far ends at the run's estimate | exact; 1e-10 |
| token gains | log p of each token by the table's rows | 1e-10 |
| everything drawn | nothing raises, and what is missing is said | |

Mutants that are rejected: weights softmax(-r/β) and softmax(r β); KL(prior ‖ p_β); a survival function from the wrong end.
"""

import html
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import oracle
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppl_lm import plot
from ppl_lm.criticism.calibration import sbc
from ppl_lm.criticism.diagnoses.diagnosis import diagnose
from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.gains import token_gains
from ppl_lm.criticism.reward_frontier import reward_kl_frontier
from ppl_lm.criticism.weights import psis_khat
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.enumeration import enumerate_posterior, kl
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.twists.functions import prefix_likelihood
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import table_lm
from ppl_lm.lm.tokens.token_pieces import pieces
from ppl_lm.lm.vocabulary import Vocabulary
from ppl_lm.models import tilted
from ppl_lm.plot.untrusted import plain, visible
from ppl_lm.plot.weight_tails import pareto_scale
from ppl_lm.report.heat_map import heat_html

TEXTS = ["", "a"]


def capped(completions, **_):
    return [min(1.0, 0.4 * text.count("a") + 0.05 * text.count("b")) for text in completions]


capped.r_max = 1.0


@pytest.fixture(scope="module")
def problem():
    lm = table_lm(4, 3, max_prompt=2, concentration=1.0, seed=3)
    target, guide = bind(tilted, lm, reward=capped, beta=0.5), bind(finetuned, lm.copy())
    noise = torch.randn(guide.lm.model.table.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        guide.lm.model.table += 0.5 * noise
    return target, guide


def rendered(ax: Axes) -> str:
    """What stands above the plot; it is drawn, so that nothing is left to fail later."""
    assert isinstance(ax, Axes)
    ax.figure.savefig("/dev/null", format="png")
    return ax.get_title(loc="left")


def line(ax: Axes, label: str):
    (found,) = [made for made in ax.get_lines() if label in str(made.get_label())]
    return torch.tensor(found.get_xdata(), dtype=torch.float64), torch.tensor(found.get_ydata(), dtype=torch.float64)


def metrics(steps: int) -> list:
    return [{"step": n, "elbo": 0.1 * n + (-1) ** n, "elbo_se": 0.2} for n in range(steps)]


# the fit


def test_training_shows_every_step_a_running_mean_and_the_bracket(problem):
    made = diagnose(*problem, TEXTS, num_samples=400).as_json()
    ax = plot.training(metrics(40), made)
    assert rendered(ax) == ""
    step, elbo = line(ax, "ELBO of a step")
    assert step.tolist() == list(range(40)) and elbo.tolist() == [row["elbo"] for row in metrics(40)]
    _, mean = line(ax, "running mean of 7")
    for n in range(40):
        reach = min(3, n, 39 - n)
        assert float(mean[n]) == pytest.approx(float(elbo[n - reach : n + reach + 1].mean()), abs=1e-12)
    assert set(line(ax, "log Z")[1].tolist()) == {made["log_z"]}
    texts = " ".join(text.get_text() for text in ax.texts)
    assert f"{made['kl_q_p']:.2f} ± {made['kl_q_p_se']:.2f}" in texts and f"{made['kl_p_q']:.2f}" in texts
    ends = sorted(float(c.lines[0].get_ydata()[0]) for c in ax.containers)
    assert ends == pytest.approx([made["elbo"], made["upper"]])


def test_training_says_what_it_does_not_show(problem):
    assert rendered(plot.training([])) == "no step was made"
    assert rendered(plot.training(metrics(1))) == ""
    rows = metrics(5)
    rows[1]["elbo"] = rows[3]["elbo"] = None
    rows[2] |= {"elbo": -math.inf, "elbo_se": math.inf}
    rows[4] |= {"elbo_se": math.nan}
    assert "3 of 5 steps" in rendered(plot.training(rows))
    assert "2 of 2 steps" in rendered(plot.training([{"step": 0, "elbo": None}, {"step": 1}]))
    told = rendered(plot.training(metrics(3), {"elbo": None, "elbo_se": None, "log_z": 1.0, "log_z_se": 0.1}))
    assert "ELBO is not finite" in told and "EUBO is not finite" in told
    made = {"elbo": 0.99, "elbo_se": 0.01, "log_z": 1.0, "log_z_se": 0.01, "upper": 1.01, "upper_se": math.nan}
    tight = plot.training(metrics(300), made | {"kl_q_p": 0.01, "kl_p_q": 0.01})
    assert rendered(tight) == "" and "approximate" not in tight.get_legend().get_texts()[-1].get_text()
    renderer = FigureCanvasAgg(tight.figure).get_renderer()
    low, high = (text.get_window_extent(renderer) for text in tight.texts)
    assert low.y1 < high.y0, "labels of a tight bracket stand apart"


# the frontier


def truth(target, beta):
    """KL(p_β ‖ prior) and E[reward] by enumeration, means over prompts."""
    made = enumerate_posterior(target, None, TEXTS)
    reward = made.records["reward"].double()
    log_prior = made.log_joint - reward / 0.5
    log_p = (log_prior + reward / beta).log_softmax(0)
    return float(kl(log_p, log_prior).mean()), float((log_p.exp() * reward).sum(0).mean()), log_prior, log_p


def test_the_frontier_is_that_of_enumeration(problem):
    """At the KL of p_β the curve has the reward of p_β; so the curve, and not its parameter alone, is compared."""
    target, _ = problem
    draws = importance(target, None, TEXTS, num_samples=4000)
    ax = plot.frontier(draws, betas=[0.5])
    rendered(ax)
    nats, reward = line(ax, "best at each KL")
    assert bool((nats.diff() > -1e-9).all()) and bool((reward.diff() > -1e-9).all())
    for beta in (2.0, 0.5, 0.2, 0.1):
        at, best, log_prior, log_p = truth(target, beta)
        after = int(torch.searchsorted(nats, at))
        share = (at - nats[after - 1]) / (nats[after] - nats[after - 1])
        found = float(reward[after - 1] + share * (reward[after] - reward[after - 1]))
        _, _, se, worth = reward_kl_frontier(draws, [beta])[:, 0].tolist()
        assert abs(found - best) < 4 * se < 0.05 and worth > 30, beta
        backwards = float(kl(log_prior, log_p).mean())
        assert beta > 0.1 or beta * abs(backwards - at) > 4 * se, "KL(prior ‖ p_β) would be seen"
        assert all(abs(truth(target, wrong)[1] - best) > 4 * se for wrong in (-beta, 1 / beta)), "would be seen"
    marked = [made.get_xydata()[0].tolist() for made in ax.get_lines() if made.get_marker() == "o"]
    assert marked == [pytest.approx(reward_kl_frontier(draws, [0.5])[:2, 0].tolist())]


def test_the_error_of_the_frontier_is_its_spread_at_a_kl(problem):
    target, _ = problem
    whole = importance(target, None, TEXTS, num_samples=200 * 300)
    parts = [whole.map(lambda v, i=i: v[:, i * 300 : (i + 1) * 300]) for i in range(200)]
    made = torch.stack([reward_kl_frontier(part, [0.3])[:, 0] for part in parts])  # (200, 4)
    at, best, *_ = truth(target, 0.3)
    gap = made[:, 1] - best - 0.3 * (made[:, 0] - at)  # at the KL of the truth: the slope is β
    assert abs(float(made[:, 2].mean() / gap.std()) - 1) < 3 / (2 * 200) ** 0.5 + 0.05
    assert not 0.8 < float(made[:, 1].std() / gap.std()) < 1.25, "the error at a β is another"


def test_the_curve_ends_where_the_draws_do(problem):
    draws = importance(problem[0], None, [""], num_samples=500)
    bonus = torch.arange(500.0, dtype=torch.float64).reshape(1, 500, 1)  # one best draw
    alone = replace(draws, records={"reward": bonus})
    ax = plot.frontier(alone, {"lost": (math.nan, 0.1, 1.0, None), "$x^2$\x1b": (1.0, 0.1, 2.0, None)}, betas=[0.01])
    said = rendered(ax)
    assert "lost has no finite KL" in said and "out of reach" in said
    nats, _ = line(ax, "best at each KL")
    assert float(nats.max()) < math.log(500 / 30) + 0.5
    assert [t.get_text() for t in ax.get_legend().get_texts()][1] == r"\$x^2\$  ± SE"
    for records, words in (
        (torch.zeros(1, 500, 1), "same reward"),
        (torch.full((1, 500, 1), -math.inf), "not finite"),
    ):
        assert words in rendered(plot.frontier(replace(draws, records={"reward": records})))
    assert "too few" in rendered(plot.frontier(draws.map(lambda v: v[:, :3])))
    assert "too few" in rendered(plot.frontier(draws.map(lambda v: v[:, :1])))
    with pytest.raises(ValueError, match="needs the model's 'reward'"):
        plot.frontier(replace(draws, records={}))
    with pytest.raises(ValueError, match="not the prior's"):
        plot.frontier(importance(*problem, [""], num_samples=50))
    with pytest.raises(ValueError, match="above 0"):
        reward_kl_frontier(draws, [0.0])


# weights


def test_the_tail_is_the_survival_function():
    log_w = 1.3 * torch.empty(900, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1))
    log_w[::9] = -torch.inf
    ax = plot.weight_tail(log_w)
    khat = psis_khat(log_w)
    assert f"k-hat {khat:.2f}" in rendered(ax) and ax.get_xscale() == ax.get_yscale() == "log"
    w, share = line(ax, "800 of 900 draws")
    relative = log_w.exp() / log_w.exp().mean()
    for n in (0, 10, 799):
        assert float(share[n]) == pytest.approx(float((relative >= w[n] * (1 - 1e-12)).double().mean()), abs=1e-12)
    fit, at = line(ax, "generalised Pareto of the 85 largest")
    assert torch.equal(at, share[:85]) and bool((fit.diff() < 0).all())
    (band,) = ax.collections
    path = band.get_paths()[0]
    inside = [bool(path.contains_point((float(w[n]), float(share[n])))) for n in range(1, 84)]
    assert sum(inside) > 60, "a fit that is not these weights'"


@pytest.mark.parametrize("shape", [-0.4, 0.0, 0.6, 1.2])
def test_the_scale_is_that_of_the_pareto(shape):
    """Of 200,000 draws by inversion, within 5 standard errors of some 0.003; the likelihood is at its top there."""
    p = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    excess = (2.5 * ((p**-shape - 1) / shape if shape else -p.log())).numpy()
    found = pareto_scale(excess, shape)
    assert found == pytest.approx(2.5, rel=0.02)

    def log_likelihood(scale):
        z = torch.as_tensor(excess) / scale
        return float((-math.log(scale) - ((1 + 1 / shape) * torch.log1p(shape * z) if shape else z)).sum())

    assert not any(log_likelihood(found * by) > log_likelihood(found) for by in (0.98, 1.02))  # NaN: beyond the support


def test_a_tail_that_ends_above_all_else_ends_at_the_largest():
    """k ≤ -1: the density is highest at the end of the support, -σ / k, so no scale is the likeliest inside of it."""
    assert pareto_scale(np.array([1.0, 2.0, 3.0]), -1.5) == pytest.approx(4.5)


def test_weights_without_a_tail_say_so(problem):
    draws = importance(*problem, TEXTS, num_samples=300)
    assert "k-hat" in rendered(plot.weight_tail(draws.of_prompt(1)))
    nothing = torch.full((50,), -torch.inf).double()
    assert "none of 50 draws" in rendered(plot.weight_tail(nothing))
    assert "none of 0 draws" in rendered(plot.weight_tail(nothing[:0]))
    assert "tied" in rendered(plot.weight_tail(torch.full((200,), -700.0).double()))
    assert "too few" in rendered(plot.weight_tail(torch.randn(7).double()))
    assert "too few" in rendered(plot.weight_tail(torch.zeros(1)))
    assert "not finite" in rendered(plot.weight_tail(torch.tensor([0.0, math.inf])))
    assert "not finite" in rendered(plot.weight_tail(torch.tensor([0.0, math.nan])))
    assert "k-hat" in rendered(plot.weight_tail(torch.randn(2000).double() * 40)), "weights beyond what exp can hold"
    with pytest.raises(ValueError, match=r"of_prompt\(b\)"):
        plot.weight_tail(draws)
    with pytest.raises(ValueError, match="equally weighted"):
        plot.weight_tail(mcmc(*problem, [""], num_samples=20))


# bounds and calibration


def test_every_bound_stands_in_its_methods_row(problem):
    target, guide = problem
    draws = importance(target, guide, TEXTS, num_samples=2000)
    made, told = log_evidence(draws), diagnose(target, guide, TEXTS, num_samples=2000).as_json()
    ax = plot.evidence({"own $x^2$": made, "measured": told})
    assert "hollow" in rendered(ax)
    assert [t.get_text() for t in ax.get_yticklabels()] == [r"own \$x^2\$", "measured"]
    found = {}
    for bars in ax.containers:
        ((x, y),) = bars.lines[0].get_xydata()
        found.setdefault(round(y), []).append((float(y), float(x)))
    names = ("elbo", "iwae", "log_z", "iwae_upper", "upper")
    assert [x for _, x in sorted(found[0])] == pytest.approx([float(getattr(made, name).mean()) for name in names])
    assert [x for _, x in sorted(found[1])] == pytest.approx([told[name] for name in names])
    assert [t.get_text() for t in ax.get_legend().get_texts()][1] == "IWAE-64"
    (bar,) = ax.containers[0].lines[2]
    ((a, _), (b, _)) = bar.get_segments()[0]
    assert (b - a) / 2 == pytest.approx(float(made.elbo_se.square().sum().sqrt()) / 2)
    lost = told | {"elbo": None, "elbo_se": None, "upper_se": math.nan, "upper": math.inf, "num_samples": None}
    ax = plot.evidence({"_hard": lost, "iwae": made})
    assert "_hard: ELBO, EUBO not finite" in rendered(ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()][1] == "IWAE"
    assert rendered(plot.evidence({})) == "no method is given"
    assert "not finite" in rendered(plot.evidence({"nothing": {}}))


def test_sbc_is_the_ecdf_less_the_uniform(problem):
    target, guide = problem
    some, many = rejection(target, None, [""], num_samples=60), rejection(target, None, [""], num_samples=60 * 9)
    made = sbc(some, many, 9)
    ax = plot.calibration(made)
    assert "60 replications" in rendered(ax)
    for name, ranks in made.ranks.items():
        at, gap = line(ax, f"{name}, p = ")
        want = [float((ranks <= k).double().mean()) - (k + 1) / 10 for k in range(10)]
        assert at.tolist() == list(range(10)) and gap.tolist() == pytest.approx(want, abs=1e-12)
    one = plot.calibration(made, name="reward")
    assert len(one.get_legend().get_texts()) == 2
    with pytest.raises(ValueError, match="'reward'"):
        plot.calibration(made, name="rewards")
    odd = replace(made, ranks={"$x^2$": made.ranks["reward"]}, p_values={"$x^2$": 0.5})
    assert r"\$x^2\$, p = 0.5" in [t.get_text() for t in plot.calibration(odd).get_legend().get_texts()]


# texts


def test_gains_are_the_tables(problem):
    target, guide = problem
    draws = importance(target, guide, TEXTS, num_samples=40)
    draws = draws.map(lambda v: v.reshape(2, 20, *v.shape[2:]))  # chains
    gains = token_gains(target, guide, draws)
    assert gains.shape == (2, 20, 2, 3) and gains.dtype == torch.float64
    torch.testing.assert_close(gains.sum(-1), draws.log_guide - draws.log_prior, atol=1e-4, rtol=0)
    alive = draws.prompts.vocabulary.alive(draws["x"])
    assert bool((gains[~alive] == 0).all()) and bool((gains[alive].abs() > 1e-9).all()) and bool((~alive).any())
    p, q = target.lm.model.table.detach(), guide.lm.model.table.detach()
    for b, prompt in enumerate([(3,), (0,)]):  # the empty prompt is <end>
        rows = [tuple(row) for row in draws.prompts.vocabulary.completion_ids(draws["x"][..., b, :].flatten(0, 1))]
        want = oracle.token_log_probs(q, prompt, rows) - oracle.token_log_probs(p, prompt, rows)
        torch.testing.assert_close(gains[..., b, : want.shape[1]].flatten(0, 1), want, atol=1e-10, rtol=0)
    one = draws.map(lambda v: v[:1, :1])
    torch.testing.assert_close(token_gains(target, guide, one), gains[:1, :1], atol=1e-12, rtol=0)
    assert bool((token_gains(target, target, draws) == 0).all())


def test_gains_ask_no_reward_and_know_other_latents(problem):
    calls = []

    def shared(prompts, prior, reward):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prompts))
            pyro.sample(
                "o", dist.Bernoulli(torch.sigmoid(z + reward(prompts, x))), obs=torch.ones(len(prompts)).double()
            )

    def guide(prompts, lm):
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.6).double()))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("x", lm(prompts))

    def counted(completions, **_):
        calls.append(len(completions))
        return capped(completions)

    lm = problem[0].lm
    model, other = bind(shared, lm, reward=counted), bind(guide, problem[1].lm.copy())
    draws = importance(model, other, TEXTS, num_samples=30)
    before = len(calls)
    gains = token_gains(model, other, draws)
    assert len(calls) == before
    torch.testing.assert_close(gains, token_gains(*problem, draws_of_text(draws)), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="not one text a prompt"):
        token_gains(model, other, draws, site="z")
    with pytest.raises(ValueError, match="no text at the site 'x'"):
        token_gains(lambda prompts: None, other, draws)


def draws_of_text(draws):
    return replace(draws, latents={"x": draws["x"]})


def test_gains_and_pieces_of_the_embedded_lm():
    lm = LanguageModel.from_pretrained(max_new_tokens=24)
    target, guide = bind(tilted, lm, reward=capped, beta=0.5), bind(finetuned, lm.copy())
    with torch.no_grad():
        for weight in guide.parameters():
            weight *= 1.02
    draws = importance(target, guide, ["The soup was", "I"], num_samples=20)
    gains = token_gains(target, guide, draws)
    assert float(gains.abs().max()) > 0.01
    torch.testing.assert_close(gains.sum(-1), draws.log_guide - draws.log_prior, atol=1e-4, rtol=0)
    for row, text in zip(draws["x"][0, :, 0], draws.text()[0], strict=True):
        made = pieces(draws.prompts.vocabulary, row)
        assert len(made) == int(draws.prompts.vocabulary.lengths(row))
        assert "".join(made[:-1] if made[-1].startswith("⟨") else made) == text


def byte_vocabulary() -> Vocabulary:
    return Vocabulary(tiny.bpe(), 300, [2], 0, 1)


@pytest.mark.parametrize(
    "text", ["the soup was good", "naïve café", "日本 🙂!", "🙂", "a\ufffdb", "é", " two  spaces \n"]
)
def test_pieces_are_the_text(text):
    vocabulary = byte_vocabulary()
    ids = vocabulary.encode(text)
    row = torch.tensor([*ids, 2, 0, 0])
    made = pieces(vocabulary, row)
    assert len(made) == len(ids) + 1 and made[-1] == "⟨s⟩"
    assert "".join(made[:-1]) == text == vocabulary.decode(row.unsqueeze(0))[0]
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in made)


def test_pieces_of_broken_and_special_tokens():
    vocabulary = byte_vocabulary()
    half = vocabulary.encode("é")[:1]
    assert len(vocabulary.encode("é")) == 2
    made = pieces(vocabulary, torch.tensor([*half, *vocabulary.encode("soup"), *half]))
    assert "".join(made) == "\ufffdsoup\ufffd" and made[-1] == "\ufffd"
    assert pieces(vocabulary, torch.tensor([3, 2, 0])) == ["⟨user⟩", "⟨s⟩"]
    assert pieces(vocabulary, torch.tensor([2, 0])) == ["⟨s⟩"]
    lm = table_lm(4, 3)
    assert pieces(lm.vocabulary, torch.tensor([0, 1, 3])) == ["a", " b", "⟨end⟩"]
    assert pieces(lm.vocabulary, torch.tensor([0, 1, 2])) == ["a", " b", " c"]


def test_html_is_text_and_nothing_else():
    tokens = ["<script>alert('x')</script>", "\u202e", 'a" onclick="b', "&amp;", "\x1b[31m", "", "\n", "\u2028"]
    made = heat_html(tokens, [1.0, -2.0, math.nan, 0.0, math.inf, -math.inf, None, 4e-9])
    assert "<script" not in made and "\u202e" not in made and "\x1b" not in made and "\n" not in made
    tags = set(re.findall(r"<\s*/?\s*(\w+)", made))
    assert tags == {"div", "span"} and made.count("<span") == made.count("</span>") == len(tokens)
    inside = [html.unescape(t) for t in re.findall(r">([^<>]*)</span>", made)]
    assert inside == [visible(token) for token in tokens]
    assert inside[1] == "⟨U+202E⟩" and inside[4] == "⟨U+001B⟩[31m" and inside[5] == "⋯" and inside[7] == "⟨U+2028⟩"
    shares = [float(v) for v in re.findall(r"--v:([-\d.]+)", made)]
    assert shares == [0.5, -1, 0, 0, 1, -1, 0, 0] and 'title="-2.000 nats"' in made
    assert re.findall(r'class="token (\w+)"', made)[:4] == ["up", "down", "unknown", "zero"]
    assert 'onclick="' not in made
    assert [float(v) for v in re.findall(r"--v:([-\d.]+)", heat_html(["a"], [1.0], scale=4))] == [0.25]
    assert heat_html([], []) == '<div class="heat"></div>'
    with pytest.raises(ValueError, match="2 values for 1 tokens"):
        heat_html(["a"], [1.0, 2.0])


def test_heat_is_centred_wrapped_and_plain():
    tokens = ["$x^2$", " and", " $\\alpha$", "\u202e", "<b>", "\n", "\x07", ""] * 12
    values = [1.0, -2.0, 0.0, math.nan, math.inf, None, 0.5, -0.5] * 12
    ax = plot.heat(tokens, values)
    assert rendered(ax) == "36 of 96 values are not finite"
    assert [t.get_text() for t in ax.texts] == [visible(t) for t in tokens]
    assert not any(t.get_parse_math() for t in ax.texts)
    width, (bottom, top) = ax.get_xlim()[1], ax.get_ylim()
    for box in ax.patches:
        assert box.get_x() + box.get_width() <= width and top <= box.get_y() <= bottom
    for dpi in (80, 100, 120, 200):  # glyphs are as wide as whole pixels
        ax.figure.set_dpi(dpi)
        ax.figure.draw_without_rendering()
        renderer, to_data = FigureCanvasAgg(ax.figure).get_renderer(), ax.transData.inverted()
        for text, box in zip(ax.texts, ax.patches, strict=True):
            inside = text.get_window_extent(renderer).transformed(to_data)
            assert inside.x1 <= box.get_x() + box.get_width() + 0.1, (text.get_text(), dpi)
    red, white, blue = (ax.patches[n].get_facecolor() for n in (1, 2, 0))
    assert red[0] > red[2] and blue[2] > blue[0] and min(white[:3]) > 0.95
    assert ax.patches[3].get_facecolor()[:3] == (0.85, 0.85, 0.85)
    assert min(t.get_fontsize() for t in ax.texts) >= 8


def test_heat_on_given_axes_counts_what_does_not_fit():
    first, second = Figure(figsize=(8, 3), layout="constrained").subplots(1, 2)
    assert plot.heat(["word "] * 400, [0.1] * 400, ax=first) is first
    said = rendered(first)
    left_out = int(re.match(r"(\d+) of 400 tokens do not fit", said)[1])
    assert len(first.texts) == 400 - left_out > 20
    assert max(box.get_y() + box.get_height() for box in first.patches) <= first.get_ylim()[0]
    assert rendered(plot.heat([], [], ax=second)) == "no token is given"
    assert rendered(plot.heat(["x" * 900], [0.0])) == ""
    assert rendered(plot.heat(["a"], [0.0])) == ""


# all of them


def test_plain_text_stays_as_it_is():
    assert plain("a\x1b[31m$x$\u202e_") == r"a [31m\$x\$ _" and plain("_hidden") == " _hidden"


def test_the_steps_of_smc_are_its_stats(problem):
    """Each run's share of effective texts, a mark where it was resampled, and log Ẑ so far, which ends at its estimate."""
    settings = SMCSettings(prefix_likelihood(problem[0]), threshold=0.9)
    draws = smc(problem[0], None, TEXTS, num_samples=16, num_runs=45, settings=settings)
    one = draws.of_prompt(1)
    ax = plot.smc_steps(one)
    assert "first 40 of 45 runs" in rendered(ax) and "45 runs" in ax.get_legend().get_texts()[2].get_text()
    token, share = line(ax, "ESS of a run")
    assert token.tolist() == [1, 2, 3] and torch.equal(share * 16, one.stats["ess"][0, 0, 0])
    at, height = line(ax, "resampled")
    (where,) = one.stats["resampled"][0, 0, 0].nonzero(as_tuple=True)
    assert torch.equal(at - 1, where.double()) and torch.equal(height, share[where])
    assert bool(one.stats["resampled"].any())
    torch.testing.assert_close(line(ax, "mean ESS")[1] * 16, one.stats["ess"][:, 0, 0].mean(0))
    (right,) = [other for other in ax.figure.axes if other is not ax]
    log_z = one.log_weight.logsumexp(1)[:, 0] - math.log(16)
    ends = torch.tensor([curve.get_ydata()[-1] for curve in right.get_lines()])
    torch.testing.assert_close(ends, log_z[:40], atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="2 prompts"):
        plot.smc_steps(draws)
    with pytest.raises(ValueError, match="have no steps"):
        plot.smc_steps(importance(*problem, [""], num_samples=30))
    lost = replace(one, stats=one.stats | {"log_z_increment": torch.full_like(one.stats["ess"], -torch.inf)})
    assert "45 of 45 runs have lost all weight" in rendered(plot.smc_steps(lost))


def test_each_draws_on_the_axes_it_is_given_and_leaves_pyplot_alone(problem):
    made = diagnose(*problem, [""], num_samples=200)
    gains = token_gains(*problem, made.guide)[0, 0, 0].tolist()
    found = sbc(rejection(problem[0], None, [""], num_samples=20), made.guide, 9)
    plots = [
        lambda ax: plot.training(metrics(3), made.as_json(), ax=ax),
        lambda ax: plot.frontier(made.prior, ax=ax),
        lambda ax: plot.weight_tail(made.guide, ax=ax),
        lambda ax: plot.smc_steps(smc(problem[0], None, [""], num_samples=4), ax=ax),
        lambda ax: plot.evidence({"guide": made.as_json()}, ax=ax),
        lambda ax: plot.calibration(found, ax=ax),
        lambda ax: plot.heat(list("abc"), gains, ax=ax),
    ]
    for draw in plots:
        ax = Figure().subplots()
        assert draw(ax) is ax and draw(None) is not ax
    code = "import sys; from ppl_lm import plot; print(*dir(plot), 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith(
        "False\n"
    )
