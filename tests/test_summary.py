"""`summary` and the tables of draws, evidence and diagnoses: right means and errors by prompt name, texts escaped."""

import math

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch

import ppl_lm
from ppl_lm.criticism.diagnoses.diagnosis import diagnose
from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.expectations import expectation
from ppl_lm.criticism.summaries import summary
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted


def letters(completions, **_):
    return [min(1.0, 0.5 * text.count("a")) for text in completions]


letters.r_max = 1.0


@pytest.fixture
def problem():
    lm = table_lm(5, 4, concentration=1.0, seed=3)
    return bind(tilted, lm, reward=letters, beta=0.3), bind(finetuned, lm.copy())


@pytest.mark.parametrize("sampler", ["importance", "rejection", "mcmc", "smc"])
def test_means_of_every_kind_are_the_posteriors_within_their_errors(problem, sampler):
    target, guide = problem
    draws = {
        "importance": lambda: importance(target, guide, ["", "a"], num_samples=2000),
        "rejection": lambda: rejection(target, None, ["", "a"], num_samples=500),
        "mcmc": lambda: mcmc(target, guide, ["", "a"], num_samples=100, warmup=10, num_chains=4),
        "smc": lambda: smc(target, None, ["", "a"], num_samples=20, num_runs=40),
    }[sampler]()
    table, truth = summary(draws, error=0.001), enumerate_posterior(target, guide, ["", "a"])
    means = (truth.log_posterior.exp() * truth.records["reward"]).sum(0)
    assert list(table.columns) == ["mean", "sd", "se", "ess", "khat", "more_draws"]
    assert [*table.index.get_level_values("prompt").unique()] == ["", "a"] and table.index.is_unique
    estimate = expectation(draws, draws["reward"])
    for b, name in enumerate(["", "a"]):
        row = table.loc[(name, "reward")]
        assert abs(row["mean"] - float(means[b])) < 4.5 * row["se"] and row["se"] == float(estimate.se[b])
        assert row["sd"] == pytest.approx(row["se"] * math.sqrt(row["ess"]), rel=1e-2)
        total = draws.num_samples + row["more_draws"]
        assert total * 0.001**2 == pytest.approx(draws.num_samples * row["se"] ** 2, rel=0.05)
        assert sampler != "smc" or row["more_draws"] % 20 == 0, "whole runs"
    assert (summary(draws, error=10.0)["more_draws"] == 0).all()
    assert ppl_lm.summary is summary and "more_draws" not in summary(draws)


def test_what_is_not_known_is_not_made_up(problem):
    target, guide = problem
    one = importance(target, guide, [""], num_samples=1)
    row = summary(one, error=0.1).loc[("", "reward")]
    assert math.isinf(row["se"]) and row["more_draws"] is pd.NA
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive"):
            summary(one, error=wrong)
    chats = summary(
        importance(target, guide, [""], num_samples=50), statistics={"words": lambda texts: [2.0] * len(texts)}
    )
    assert chats.loc[("", "words"), "mean"] == pytest.approx(2.0) and math.isnan(chats.loc[("", "words"), "ess"])


def test_what_prompts_share_has_one_row():
    lm = table_lm(4, 3, concentration=1.0, seed=3)

    def raters(prompts, lm):
        with pyro.plate("raters", 3, dim=-2):
            strictness = pyro.sample("strictness", dist.Normal(0.0, 1.0))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", lm(prompts))
            pyro.sample(
                "o", Optimality(strictness.sum(-2, keepdim=True) * (x == 1).sum(-1)), obs=torch.ones(len(prompts))
            )

    table = summary(importance(bind(raters, lm), None, ["", "a"], num_samples=200, max_plate_nesting=2))
    assert [name for name in table.index if name[0] == "all prompts"] == [
        *(("all prompts", f"strictness[{i}]") for i in range(3)),
        ("all prompts", "log_prior"),
    ]
    assert [*table.loc["a"].index] == ["length"]


def test_prompts_have_readable_names_no_two_alike():
    lm = table_lm(4, 3)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Yes?"}]}]
    texts = ["a", "a", "a (2)", chat, chat, [{"role": "user", "content": None}]]
    prompts = Prompts.from_ids([[1]] * 6, lm.vocabulary, texts=texts)
    chat_name = "user: Hi | assistant: Yes?"
    assert prompts.names == ["a", "a (3)", "a (2)", chat_name, f"{chat_name} (2)", "user: "]


def test_draws_evidence_and_diagnoses_are_tables_and_lines():
    lm = tiny.language_model("gpt2", max_new_tokens=3)
    target, guide = bind(tilted, lm, reward=letters, beta=0.5), bind(finetuned, lm.copy())
    prompts = ["<script>alert(1)</script>", "$x$ \u202eab"]
    made = diagnose(target, guide, prompts, num_samples=100)
    draws = made.guide
    frame = draws.to_dataframe()
    assert len(frame) == 200 and list(frame["prompt"][:2]) == prompts
    assert list(frame["x"][::2]) == draws.text()[0] and list(frame["x"][1::2]) == draws.text()[1]
    for name in ("reward", "log_prior", "log_likelihood", "log_guide", "log_weight"):
        values = draws["reward"] if name == "reward" else getattr(draws, name)
        assert (frame[name].to_numpy().reshape(values.shape) == values.numpy()).all()
    evidence = log_evidence(draws)
    assert list(evidence.to_dataframe().index) == prompts and list(made.to_dataframe().index) == prompts
    assert (evidence.to_dataframe()["log_z"].to_numpy() == evidence.log_z.numpy()).all()
    assert list(made.to_dataframe()["kl_q_p"]) == [one.kl_q_p for one in made.prompts]
    for shown in (draws, evidence, made.verdict, made):
        assert "\n" not in repr(shown) and "tensor(" not in repr(shown)
        page = shown._repr_html_()
        assert "<table" in page and "<script" not in page and "\u202e" not in page, type(shown)
        assert "mathjax_ignore" in page or "tex2jax_ignore" in page  # pandas 2


def test_a_table_of_draws_shows_sites_that_are_one_number_and_texts_of_an_inner_plate():
    lm = table_lm(4, 3, concentration=1.0, seed=3)

    def two(prompts, lm):
        pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pair", 2, dim=-2):
                pyro.sample("x", lm(prompts))

    draws = importance(bind(two, lm), None, ["", "a"], num_samples=5, max_plate_nesting=2)
    frame = draws.to_dataframe()
    assert list(frame["k"]) == draws["k"].flatten().repeat_interleave(2).tolist()
    assert list(frame["z"]) == draws["z"].flatten().tolist()
    expected = [draws.prompts[i % 2 : i % 2 + 1].decode(x) for i, x in enumerate(draws["x"].flatten(0, 2))]
    assert [list(pair) for pair in frame["x"]] == expected
    assert "<table" in draws._repr_html_()
