"""Every public path on a device that is not the CPU.

| what | property | tolerance |
|---|---|---|
| each path on the fake device | runs, so it mixes no devices; its numbers are those of the CPU | 1e-9 |
| each path on CUDA | runs; its results have the CPU's shapes | none |
| the fake device | refuses what CUDA refuses, allows what CUDA allows | exact |
| drawing | counts what the host waits for | exact |

Mutants, each rejected below: a weight, a buffer, positions and an automaton that stayed on the CPU.
"""

import dataclasses
from functools import cache
from importlib.util import find_spec
from typing import Any

import networkx
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from arviz_lives import groups
from fake_device import FAKE, synchronisations
from matplotlib import pyplot
from pyro.infer import MCMC, SVI
from transformers import LlamaConfig, LlamaForSequenceClassification

from ppl_lm import plot
from ppl_lm.criticism.calibration import sbc
from ppl_lm.criticism.diagnoses.diagnosis import diagnose
from ppl_lm.criticism.diagnoses.draws_diagnosis import diagnose_draws
from ppl_lm.criticism.effective_size import ess
from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.expectations import expectation
from ppl_lm.criticism.gains import token_gains
from ppl_lm.criticism.inference_data.arviz_groups import to_arviz
from ppl_lm.criticism.inference_data.arviz_reading import from_arviz
from ppl_lm.criticism.law_tests.token_quantiles import next_token_calibration
from ppl_lm.criticism.law_tests.two_sample_tests import two_sample
from ppl_lm.criticism.model_comparison import compare_models
from ppl_lm.criticism.path_estimates import path_constants
from ppl_lm.criticism.predictive_checks import predictive_check
from ppl_lm.criticism.prefix_trees import prefix_tree
from ppl_lm.criticism.reward_frontier import reward_kl_frontier
from ppl_lm.criticism.sensitivity import power_scale
from ppl_lm.criticism.summaries import summary
from ppl_lm.criticism.text_diversity import diversity
from ppl_lm.criticism.weights import pareto_smooth, psis_khat
from ppl_lm.guides import finetuned, lora, mixture, prior, tabular, twisted
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.objectives.balance import vargrad
from ppl_lm.infer.objectives.baselines import MovingAverage, of_others
from ppl_lm.infer.objectives.catalogue import OBJECTIVES, objective
from ppl_lm.infer.objectives.divergences import forward_kl
from ppl_lm.infer.off_policy import Proposal, Replay, Reuse
from ppl_lm.infer.prediction import predictive
from ppl_lm.infer.samplers import resampling
from ppl_lm.infer.samplers.best_of_n_sampling import best_of_n
from ppl_lm.infer.samplers.conditional import conditional_smc
from ppl_lm.infer.samplers.constraints.adaptive_rejection_sampling import adaptive_rejection
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.kernels import independence, mixed, particle_gibbs, substitution, suffix
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.pyro_mcmc import SequenceKernel
from ppl_lm.infer.samplers.quasi_rejection_sampling import quality, quasi_rejection
from ppl_lm.infer.samplers.rare_events.annealing import annealed_smc
from ppl_lm.infer.samplers.rare_events.splitting_levels import splitting
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.twists import losses
from ppl_lm.infer.twists.bellman import bellman_residuals
from ppl_lm.infer.twists.fitting import fit_twist
from ppl_lm.infer.twists.functions import exact_twist, look_ahead, prefix_likelihood, prior_power, tempered
from ppl_lm.infer.twists.networks import twist_like
from ppl_lm.likelihood import rewards
from ppl_lm.likelihood.automata import Automaton
from ppl_lm.likelihood.best_of import BestOfN
from ppl_lm.likelihood.checker import Checker
from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.decoding import decoder
from ppl_lm.lm.decoding.decoder import Decoder
from ppl_lm.lm.experts import product
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.meter import Cost
from ppl_lm.lm.network import DivergedError
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.lm.text_mixture import mixture as mixture_of
from ppl_lm.models import at_least, constrained, power, tilted
from ppl_lm.run.fitting.loop import fit

TEXTS = ["", "a"]
BETA = 1.5


@Reward
def letters(completions, **_):
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


letters.r_max = 3.0


@cache  # checked once
def table(device) -> LanguageModel:
    return table_lm(3, 2, max_prompt=2, concentration=1.0, seed=1).to(device)


def problem(device):
    lm = table(device)
    guide = lm.copy()
    with torch.no_grad():
        guide.model.table.mul_(0.7)
    return bind(tilted, lm, reward=letters, beta=BETA), bind(finetuned, guide)


@cache
def llama(device, seed: int = 0) -> LanguageModel:
    return tiny.language_model("llama", max_new_tokens=4, seed=seed).double().to(device)


SOUP = ["the soup was good", "", "a dog"]  # of mixed lengths: padded


# ----- networks -----


def drawing_and_scoring(device):
    """Without and with gradients, of texts that share prompts and of texts that do not."""
    lm = llama(device)
    law = lm(SOUP)
    x = law.sample((4,))
    yield x, law.sampled_log_probs(x), law.resume(x, torch.ones_like(x[..., 0]))
    yield law.log_prob(x), law.token_and_end_log_probs(x), lm.next_token_log_probs(law.prompts, x[0]), lm.self_check()
    free = lm.copy()
    for texts in (x, x[:1]):
        free(SOUP).log_prob(texts).sum().backward()
        yield [weight.grad for weight in free.parameters()]
    rows = Decoder.of(lm, law.prompts, torch.tensor([2, 0, 0], device=device))
    rows.advance(x[0, :, 0])
    rows.reorder(torch.tensor([1, 1, 0, 2], device=device))
    yield rows.log_probs()


def prompts(device):
    lm = llama.__wrapped__(device)
    lm.vocabulary.tokenizer.chat_template = tiny.CHAT
    given = lm.prompts({"prompt": SOUP, "n": [1, 2, 3]})
    x = lm(given).sample()
    chats = lm.prompts([[{"role": "user", "content": text}] for text in SOUP])
    for each in (given, given[1], given[[2, 0]], given[torch.tensor([1])], given.append(x, suffix=" and"), chats):
        yield each.ids, each.lengths, each.mask, each.texts, each.columns
    yield given.decode(x), chats.append(x).texts, lm.completions(["a dog", "it"]), given.to("cpu").ids
    topic = dist.Categorical(torch.ones(2, 3, device=device)).sample()
    yield lm(given.take(topic)).sample()


def products_and_mixtures(device):
    lms = [llama(device, seed) for seed in (0, 1)]
    for made in (product(lms, [1.0, 0.5]), mixture_of(lms, [0.7, 0.3])):
        law = made(SOUP)
        x = law.sample((3,))
        yield x, law.sampled_log_probs(x), law.log_prob(x)
    q = lms[0].copy()
    law = mixture_of([q, lms[1]], [0.7, 0.3])(SOUP)
    law.log_prob(x).sum().backward()
    yield [weight.grad for weight in q.parameters()]


def adapters(device):
    pytest.importorskip("peft")
    lm = llama(device)
    q = lm.adapted(rank=2)
    target = bind(tilted, lm, reward=letters, beta=BETA)
    yield steps(target, bind(lora, q), SequenceELBO(4), SOUP), q(SOUP).sample((2,))
    yield [weight for weight in q.parameters() if weight.requires_grad]


def saving(device, folder):
    lm = llama(device)
    q = lm.copy()
    with torch.no_grad():
        for weight in q.parameters():
            weight.add_(0.01)
    q.save_pretrained(folder / "lm")
    again = LanguageModel.from_pretrained(folder / "lm", device=device)
    assert again.device.type == device.type
    x = q(SOUP).sample((2,))
    yield again(SOUP).log_prob(x) - q(SOUP).log_prob(x), again(SOUP).log_prob(x)
    if find_spec("peft"):
        lm = LanguageModel.from_pretrained(folder / "lm", device=device)
        adapted = lm.adapted(rank=2)
        with torch.no_grad():
            for weight in adapted.parameters():
                weight.add_(0.01 * weight.requires_grad)
        adapted.save_pretrained(folder / "adapter")
        yield LanguageModel.from_pretrained(folder / "adapter", device=device)(SOUP).log_prob(x)


# ----- evidence -----


def rewards_of_all_kinds(device):
    lm = llama(device)
    given, x = lm.prompts({"prompt": SOUP, "wanted": ["it", "a", "b"]}), lm(SOUP).sample((2,))

    def of_everything(prompts, completions, completion_ids, wanted):
        rows = zip(prompts, completions, completion_ids, wanted, strict=True)
        return torch.tensor([float(w in text) + len(ids) for _, text, ids, w in rows])

    reward = Reward(of_everything)(given, x)
    assert reward.device.type == device.type
    yield reward, Reward(rewards.vader)(given, x), BestOfN(rewards.length, lm, n=4, num_references=16)(given, x)
    words = tiny.bpe()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=300, pad_token_id=0, max_position_embeddings=64, num_labels=2, **size)
        judge = LlamaForSequenceClassification(config).double().to(device)
    yield Reward(rewards.classifier(judge, 1, words))(given, x)


def letters_in_order() -> networkx.MultiDiGraph:
    graph = networkx.MultiDiGraph()
    graph.add_edge("start", "a", token="a")
    graph.add_edge("start", "b", token="b")
    graph.add_edge("a", "b", token="b")
    return graph


def automata(device):
    lm = table(device)
    rule = Automaton.graph(letters_in_order(), "start", ["b"], lm.vocabulary)
    spelled = llama(device)
    yield product([spelled, Automaton.regex("[ab ]*", spelled.vocabulary).mask(spelled)])(SOUP).sample((2,))
    masked = product([lm, rule.mask(lm)])
    x = masked(TEXTS).sample((20,))
    yield x, masked(TEXTS).log_prob(x), rule.holds(x)
    target = bind(constrained, lm, constraint=rule)
    yield importance(target, bind(prior, masked), TEXTS, num_samples=20)
    yield smc(target, None, TEXTS, num_samples=8, settings=SMCSettings(twist=rule.mask(lm)))
    guide = bind(finetuned, product([lm.copy(), rule.mask(lm)]))
    yield steps(target, guide, SequenceELBO(8, objective=forward_kl), TEXTS)


def checkers(device):
    lm = table(device)
    checker = Checker(lambda text, whole: "b" not in text and (bool(text) or not whole), cut_off=True)
    target = bind(constrained, lm, constraint=checker)
    yield adaptive_rejection(target, TEXTS, num_samples=20)
    yield smc(target, None, TEXTS, num_samples=8, num_runs=2, settings=SMCSettings(checker=checker))


def rare_events(device):
    lm = table(device)
    along = annealed_smc(problem(device)[0], TEXTS, path=[0.5, 1.0], num_samples=8, num_runs=3)
    yield along, path_constants(along, [0.0])
    yield splitting(bind(at_least, lm, reward=letters, level=1.0), TEXTS, num_samples=64, num_runs=4)


def of_which_law(device):
    target, guide = problem(device)
    draws, exact = importance(target, guide, TEXTS, num_samples=20), rejection(target, None, TEXTS, num_samples=20)
    yield two_sample(draws, exact, num_permutations=19), next_token_calibration(guide, draws)


# ----- fits -----


def steps(target, guide, loss, texts, count: int = 2) -> list[float]:
    svi = SVI(target, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    return [svi.step(texts) for _ in range(count)]


def by(name):
    def path(device):
        target, guide = problem(device)
        loss = SequenceELBO(4, objective=objective(name, BETA))
        yield steps(target, guide, loss, TEXTS), loss.loss(target, guide, TEXTS), guide.lm.model.table

    return path


def estimates_and_sources(device):
    for given in (
        {"baseline": MovingAverage(), "micro_batch": 3},
        {"objective": forward_kl, "log_z": of_others},
        {"objective": forward_kl, "source": "proposal", "clip_ratio": 0.2, "max_ratio": 5.0},
        {"objective": forward_kl, "source": Reuse(2)},
        {"objective": vargrad, "source": Replay(capacity=8, share=0.5)},
    ):
        target, guide = problem(device)
        if given.get("source") == "proposal":
            given = {**given, "source": Proposal.like(guide, every=2)}
        yield steps(target, guide, SequenceELBO(8, **given), TEXTS, 4), guide.lm.model.table


def mixed_program(device):
    """A topic, a number with a pathwise gradient, a parameter of the model's own, two texts, several observations."""
    lm = table(device)

    def model(prompts):
        weight = pyro.param("weight", torch.tensor(0.5, dtype=torch.float64, device=device))
        with pyro.plate("prompts", len(prompts)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64, device=device), 1.0))
            topic = pyro.sample("topic", dist.Categorical(torch.ones(2, dtype=torch.float64, device=device)))
            first = pyro.sample("first", lm(prompts))
            second = pyro.sample("second", lm(lm.prompts(TEXTS).take(topic)))
            score = letters(prompts, first) + weight * letters(prompts, second)
            pyro.sample("y", dist.Normal(z + score, 1.0), obs=torch.ones(len(prompts), device=device))

    q, r = lm.copy(), lm.copy()

    def guide(prompts):
        loc = pyro.param("loc", torch.zeros(2, dtype=torch.float64, device=device))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("z", dist.Normal(loc, 1.0))
            topic = pyro.sample("topic", dist.Categorical(torch.ones(2, dtype=torch.float64, device=device)))
            pyro.sample("first", q(prompts))
            pyro.sample("second", r(lm.prompts(TEXTS).take(topic)))

    given = lm.prompts(TEXTS)
    yield steps(model, guide, SequenceELBO(8), given), dict(pyro.get_param_store())
    yield importance(model, guide, given, num_samples=10)
    elbo = pyro.infer.TraceGraph_ELBO()  # which follows values by their provenance
    yield steps(model, guide, elbo, given, 1)


def fitting(device):
    target, guide = problem(device)
    done = fit(target, guide, TEXTS, SequenceELBO(8), max_steps=4, seed=1)
    yield (
        done.gain,
        done.gain_se,
        done.metrics,
        guide.lm.model.table,
    )
    target, _ = problem(device)
    guides = (bind(tabular, table_like(table(device), 2)), bind(mixture, table(device).copy(), table(device)))
    for guide in guides:
        yield fit(target, guide, TEXTS, SequenceELBO(8), max_steps=2, seed=1).gain


# ----- samplers -----


def samplers(device):
    target, guide = problem(device)
    for draws in (
        importance(target, guide, TEXTS, num_samples=20),
        importance(bind(power, table(device)), None, TEXTS, num_samples=20),
        rejection(target, None, TEXTS, num_samples=5),
        rejection(target, guide, TEXTS, num_samples=5, log_bound=9.0),
        quasi_rejection(target, guide, TEXTS, num_samples=5, log_bound=1.0),
        best_of_n(target, guide, TEXTS, num_samples=10, n=3),
        best_of_n(target, guide, TEXTS, num_samples=10, n=3, soft=True),
    ):
        yield draws, draws.weights, draws.text(), draws.to_dataframe().values.tolist(), draws.under(guide)
        yield draws.reweighted(5), dataclasses.astuple(quality(draws, 1.0)), draws.of_prompt(1).log_weight


def chains(device):
    target, guide = problem(device)
    for kernel in (independence, suffix, mixed(suffix, substitution), particle_gibbs(4)):
        yield mcmc(target, guide, TEXTS, num_samples=3, warmup=2, num_chains=4, kernel=kernel)
    sampler = MCMC(SequenceKernel(target, guide), num_samples=4, warmup_steps=2, disable_progbar=True)
    sampler.run(TEXTS)
    yield sampler.get_samples()


def sequential(device):
    target, guide = problem(device)
    twist = prefix_likelihood(target)
    exact = rejection(target, None, TEXTS, num_samples=3)
    for settings in (
        SMCSettings(threshold=2.0),
        SMCSettings(twist=tempered(twist, 3), candidates=2),
        SMCSettings(twist=exact_twist(target, TEXTS), candidates=3, threshold=2.0, resample=resampling.multinomial),
        SMCSettings(twist=twist_like_table(device), resample=resampling.stratified, threshold=2.0),
        SMCSettings(twist=twist, expand=2, resample=resampling.without_replacement),
        SMCSettings(twist=look_ahead(target, 2, rollouts=2), at=(1, 2), moves=1),
        SMCSettings(twist=twist_like_table(device), at=(2,), moves=2, threshold=0.0),
        SMCSettings(twist=prior_power(2.0), at=(1,), moves=1),
    ):
        for proposal in (None, guide) if settings.candidates is None else (None,):
            yield smc(target, proposal, TEXTS, num_samples=6, num_runs=3, settings=settings)
            if settings.moves:
                continue
            yield conditional_smc(target, proposal, exact, num_samples=6, settings=settings)


def residuals(device):
    target, _ = problem(device)
    yield bellman_residuals(target, twist_like_table(device), importance(target, None, TEXTS, num_samples=5))
    yield diagnose(target, bind(twisted, table(device), twist_like_table(device)), TEXTS, 100).guide


def twist_like_table(device) -> LanguageModel:
    twist = table(device).copy()
    with torch.no_grad():
        twist.model.table.mul_(0.3)
    return twist


def learned_twists(device):
    lm, (target, guide) = llama(device), problem(device)
    yield fit_twist(bind(tilted, lm, reward=letters, beta=BETA), twist := twist_like(lm), SOUP, steps=2, num_samples=4)
    yield importance(bind(prior, lm), bind(twisted, lm, twist), SOUP, num_samples=4)
    exact = rejection(target, None, TEXTS, num_samples=8)
    for loss in (losses.sixo, losses.soft_rl, losses.fudge, losses.log_variance):
        positives = exact if loss is losses.sixo else None
        twist, given = twist_like_table(device), {"steps": 2, "num_samples": 8, "guide": guide}
        yield fit_twist(target, twist, TEXTS, loss=loss, positives=positives, **given), twist.model.table


def enumeration(device):
    truth = enumerate_posterior(*problem(device), TEXTS)
    yield truth.latents, truth.log_joint, truth.log_q, truth.records, truth.kl_p_q, truth.elbo
    yield table(device)(TEXTS).enumerate_support()


# ----- criticism -----


def diagnosing(device):
    target, guide = problem(device)
    found = diagnose(target, guide, TEXTS, num_samples=128)
    yield found.as_json(), found.exact, found.to_dataframe().shape
    exact, chain = (
        rejection(target, None, TEXTS[:1], num_samples=40),
        mcmc(target, guide, TEXTS, num_samples=12, warmup=2, num_chains=4),
    )
    runs = smc(target, guide, TEXTS, num_samples=8, num_runs=8)
    for draws in (exact, chain, runs, found.guide):
        yield diagnose_draws(draws), expectation(draws, draws["reward"]), ess(draws), summary(draws).values.tolist()
        yield to_arviz(draws)
    yield from_arviz(to_arviz(found.guide), found.guide.prompts)
    yield to_arviz(found.guide, prior=found.prior, posterior_predictive=predictive(target, found.guide))
    one = found.guide.of_prompt(0)
    yield log_evidence(one, exact), psis_khat(one.log_weight.flatten()), pareto_smooth(one), diversity(one)
    yield compare_models({"a": found.guide, "b": found.prior}, same_likelihood=True)
    yield sbc(exact, found.guide.of_prompt(0), num_draws=3), power_scale(one), token_gains(target, guide, found.guide)
    size = {"length": lambda texts: [float(len(text)) for text in texts]}
    yield predictive_check(one, ["a b", "b"], size), predictive_check(one, exact["x"].flatten(0, 2), size)
    tree = prefix_tree(found.prior, found.guide, exact)
    yield {str(node): values for node, values in tree.nodes(data=True)}, reward_kl_frontier(found.prior, [0.5, 2.0])
    for draw in (
        lambda: plot.frontier(found.prior),
        lambda: plot.smc_steps(runs.of_prompt(0)),
        lambda: plot.weight_tail(one),
    ):
        draw()
        pyplot.close("all")


PATHS = {
    **{path.__name__: path for path in (drawing_and_scoring, prompts, products_and_mixtures, adapters, saving)},
    **{path.__name__: path for path in (rewards_of_all_kinds, automata, estimates_and_sources, mixed_program, fitting)},
    **{path.__name__: path for path in (checkers, rare_events, of_which_law)},
    **{
        path.__name__: path
        for path in (samplers, chains, sequential, residuals, learned_twists, enumeration, diagnosing)
    },
    **{name: by(name) for name in OBJECTIVES},
}


# ----- what is found there, and here -----


COSTS = ("lm_tokens", "seconds", "tokens_per_second")


def leaves(value) -> list[Any]:
    """Tensors on the CPU, numbers and texts of whatever a path gives, but for what it cost: elsewhere rows that have ended
    are drawn on for a while."""
    if isinstance(value, torch.Tensor):
        return [value.detach().cpu()]
    if isinstance(value, Prompts):
        return leaves([value.ids, value.lengths, value.texts, value.columns])
    if isinstance(value, Cost):
        return []
    if dataclasses.is_dataclass(value):
        return leaves([getattr(value, field.name) for field in dataclasses.fields(value)])
    if isinstance(value, dict):
        return leaves([item for item in value.items() if not any(word in str(item[0]) for word in COSTS)])
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    if hasattr(value, "dtype"):
        return [torch.as_tensor(value)] if value.dtype.kind in "fiub" else [value.tolist()]
    if callable(getattr(value, "groups", None)) or hasattr(value, "children"):  # ArviZ's
        return leaves({name: {k: v.values for k, v in value[name].data_vars.items()} for name in sorted(groups(value))})
    assert value is None or isinstance(value, (float, int, str)), value
    return [value]


def run(path, device, folder) -> list[Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    return leaves(list(path(device, folder) if path is saving else path(device)))


@pytest.mark.parametrize("path", PATHS)
def test_each_path_runs_elsewhere_as_it_does_on_the_cpu(path, elsewhere, tmp_path):
    here, there = (run(PATHS[path], device, tmp_path / device.type) for device in (torch.device("cpu"), elsewhere))
    assert len(here) == len(there) and any(isinstance(leaf, torch.Tensor) for leaf in here)
    for a, b in zip(here, there, strict=True):
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.dim()) == (b.dtype, b.dim())
            if elsewhere == FAKE:
                torch.testing.assert_close(b, a, atol=1e-9, rtol=1e-9, equal_nan=True)
        elif elsewhere == FAKE:
            assert b == (pytest.approx(a, rel=1e-9, abs=1e-9, nan_ok=True) if isinstance(a, float) else a)


def weight_left_behind(lm):
    head = lm.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().cpu(), requires_grad=False)


def buffer_left_behind(lm):
    """The rotary frequencies are moved by transformers itself at every pass; a norm's weight is not."""
    norm = lm.model.model.norm
    weight = norm.weight.detach().cpu()
    del norm.weight
    norm.register_buffer("weight", weight)


def positions_left_behind(lm):
    inside = lm.logits
    lm.logits = lambda positions, **given: inside(positions=positions.cpu(), **given)


@pytest.mark.parametrize("leave", [weight_left_behind, buffer_left_behind, positions_left_behind])
def test_what_is_left_on_the_cpu_is_found_out(leave, elsewhere):
    lm = llama.__wrapped__(elsewhere)
    x = lm(SOUP).sample((2,))
    leave(lm)
    for ask in (lambda: lm(SOUP).sample((2,)), lambda: lm(SOUP).log_prob(x)):
        with pytest.raises(RuntimeError, match="on the same device"):
            ask()


def test_a_constraint_left_on_the_cpu_is_found_out(elsewhere):
    lm = table(elsewhere)
    rule = Automaton.graph(letters_in_order(), "start", ["b"], lm.vocabulary).mask(lm)
    rule.model.needs = rule.model.needs.cpu()
    with pytest.raises(ValueError, match="forward pass: .*device"):  # of the self-check
        product([lm, rule])(TEXTS).sample((2,))


# ----- the fake device refuses what CUDA refuses -----

REFUSED = {
    "elementwise": lambda here, there: there + here,
    "comparison": lambda here, there: there == here,
    "where": lambda here, there: torch.where(there > 0, there, here),
    "matmul": lambda here, there: there @ here,
    "cat": lambda here, there: torch.cat([there, here]),
    "stack of numbers": lambda here, there: torch.stack([there[0], here[0]]),
    "gather": lambda here, there: there.gather(0, here.long()),
    "a number as an index of gather": lambda here, there: there[0].gather(0, here[0].long()),
    "searchsorted": lambda here, there: torch.searchsorted(there, here),
    "index of a CPU tensor": lambda here, there: here[there.long()],
    "values at indices": lambda here, there: there.index_put_((there.long(),), here),
    "a CPU number in place": lambda here, there: here[0].add_(there[0]),
    "out of the CPU": lambda here, there: torch.rand(2, device=there.device, generator=torch.Generator()),
    "like, out of the CPU": lambda here, there: there.uniform_(generator=torch.Generator()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_of_two_devices_are_refused(name, elsewhere):
    here = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="device"):
        REFUSED[name](here, here.to(elsewhere))


ALLOWED = {
    "a number": lambda here, there: there * here[0],
    "a number first": lambda here, there: here[0] - there,
    "where with a number": lambda here, there: torch.where(there > 1, there, here[2]),
    "filled with a number": lambda here, there: there.masked_fill(there > 1, here[0]),
    "index": lambda here, there: there[torch.tensor([2, 0])],
    "mask": lambda here, there: there[torch.tensor([True, False, True])],
    "set to a number": lambda here, there: _with(there, lambda t: t.__setitem__(t > 0, here[1])),
    "set to a CPU tensor": lambda here, there: _with(there, lambda t: t.__setitem__(slice(1, None), here[1:])),
    "copied": lambda here, there: there.new_zeros(3).copy_(here),
    "moved with its gradient": lambda here, there: torch.autograd.grad(_leaf(here).to(there.device).exp().sum(), LEAF),
    "made of numbers": lambda here, there: torch.tensor([1.0, 2.0], device=there.device) + there.new_tensor([3.0, 4.0]),
}
LEAF: list[torch.Tensor] = []


def _leaf(here):
    LEAF[:] = [here.clone().requires_grad_()]
    return LEAF[0]


def _with(tensor, change):
    change(made := tensor.clone())
    return made


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_is_allowed_and_gives_the_same(name, elsewhere):
    here = torch.arange(3, dtype=torch.float64)
    a, b = ALLOWED[name](here, here.clone()), ALLOWED[name](here, here.to(elsewhere))
    assert all(map(torch.equal, leaves(a), leaves(b)))
    assert name.startswith("moved") or b.device.type == elsewhere.type


def test_numpy_needs_the_cpu(elsewhere):
    there = torch.zeros(3, device=elsewhere)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert there.cpu().numpy().tolist() == there.tolist() == [0.0] * 3


def test_moved_parameters_that_are_one_stay_one(elsewhere):
    model = tiny.network("gpt2").to(elsewhere)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(isinstance(weight, torch.nn.Parameter) for weight in model.parameters())


# ----- what the host waits for -----

WAITS = {
    "item": lambda x: [float(x[0]), bool(x[0] > 1), int(x[1]), torch.equal(x, x)],
    "size": lambda x: [x.nonzero(), x[x > 1], x.unique(), x.masked_select(x > 1)],
    "down": lambda x: [x.cpu(), x.tolist(), x.to("cpu"), torch.zeros(3, dtype=torch.float64).copy_(x)],
    "up": lambda x: [torch.tensor([1], device=FAKE), torch.zeros(2).to(FAKE), x[torch.tensor([0])], x.new_tensor([1])],
    "nothing": lambda x: [x + 1, x[x.long()], torch.where(x > 1, x, 0), torch.arange(3, device=FAKE), x.to(FAKE)],
}


@pytest.mark.parametrize("why", WAITS)
def test_each_wait_is_counted_once(why):
    x = torch.arange(3, dtype=torch.float64).to(FAKE)
    with synchronisations() as seen:
        done = len(WAITS[why](x))
    assert seen == ({} if why == "nothing" else {why: done})


def waits_per_token(texts, count: int = 4, steps: int = 8) -> float:
    """How often the host waits in drawing `count` texts for each prompt: what `steps` tokens more cost, each."""
    seen = []
    for length in (steps, 2 * steps):
        lm = ending_early(FAKE, length)
        law = lm(texts)
        with synchronisations() as waits:
            law.sample((count,))
        seen.append(waits.total())
    return (seen[1] - seen[0]) / steps


def ending_early(device, length: int) -> LanguageModel:
    """Some of its texts end at each token."""
    lm = llama(device)
    lm(SOUP)  # is checked, once
    made = LanguageModel(lm.model, lm.vocabulary.tokenizer, length, end_ids=range(280, 300))
    made.is_checked, made.tolerance, made.shortcuts.prompts = True, lm.tolerance, lm.shortcuts.prompts
    return made


def test_drawing_waits_seldom(fake, monkeypatch):
    """Of left-padded batches transformers reads at each token whether there is padding; of others nothing is read so often."""
    assert waits_per_token(["a dog"]) <= 0.5
    assert waits_per_token(SOUP) <= 1.5
    monkeypatch.setattr(decoder, "EVERY", 1)
    assert waits_per_token(["a dog"]) >= 2


def test_texts_that_end_between_looks_are_drawn_as_on_the_cpu(fake):
    """Rows that have ended are drawn on until the host looks: what they say then is thrown away."""

    def drawn(device):
        lm = ending_early(device, 2 * decoder.EVERY + 3)
        pyro.set_rng_seed(0)
        law = lm(SOUP)
        x = law.sample((20,))
        return x.cpu(), law.sampled_log_probs(x).cpu(), law.token_log_probs(x).cpu(), lm.vocabulary.lengths(x).cpu()

    here, there = drawn(torch.device("cpu")), drawn(fake)
    assert len(here[3].unique()) > 5
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b, a, atol=1e-9, rtol=0)
    torch.testing.assert_close(there[1], there[2], atol=1e-9, rtol=0)
    assert torch.equal(there[0] == 0, ~torch.arange(there[0].shape[-1]).expand_as(there[0]).lt(there[3][..., None]))


@pytest.mark.parametrize("length", [1, 3, 12])
def test_a_network_that_diverged_is_told_elsewhere_too(elsewhere, length):
    lm = ending_early(elsewhere, length)
    law = lm(SOUP)
    broken = lm.logits_next
    lm.logits_next = lambda **given: (broken(**given)[0] * torch.nan, broken(**given)[1])
    with pytest.raises(DivergedError):
        law.sample()
