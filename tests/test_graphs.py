"""Graphs and their drawings, against enumeration and by hand.

| what | property | tolerance |
|---|---|---|
| masses of `prefix_tree`, draws of every kind | the enumerated ones | 4.5 of their standard errors |
| children + rest | the node, for any draws and weights | 1e-12 |
| texts along a branch | the decoded prefix | none |
| `automaton_graph` | accepts what the automaton accepts | none |
| `model_graph` | edges by hand | none |

Mutants that are rejected: the guide's draws without their weights; the prior's taken for the posterior's; rewards that
depend on their completions alone.

`prefix_tree.png` of the site is `picture("tutorials/site/pages/pictures/prefix_tree.png", num_samples=20_000)`.
"""

import io
import itertools
from dataclasses import replace
from functools import cache

import matplotlib.figure
import networkx
import PIL.Image
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import PathPatch

from ppl_lm import plot
from ppl_lm.criticism.prefix_trees import prefix_tree
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.traces.program_graph import model_graph
from ppl_lm.likelihood import rewards
from ppl_lm.likelihood.automata import Automaton
from ppl_lm.likelihood.automaton_graphs import automaton_graph, label
from ppl_lm.likelihood.best_of import BestOfN
from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, power, tilted
from ppl_lm.plot.prefix_diagram import _shades

BOUND = 4.5  # standard errors; of the 950 normal ones here, one exceeds it in 150 runs


def letters(completions, **_):
    return [min(1.0, 0.4 * text.count("a")) for text in completions]


letters.r_max = 1.0


def picture(path, num_samples):
    """The tree of the page "How it works": the embedded LM's texts after a prompt, and those of its posterior."""
    lm = LanguageModel.from_pretrained(max_new_tokens=24)
    target = bind(tilted, lm, reward=rewards.vader, beta=0.2)
    prior = importance(target, None, ["The soup was"], num_samples=num_samples)
    tree = prefix_tree(
        prior, posterior=rejection(target, None, ["The soup was"], num_samples=num_samples), max_nodes=40
    )
    figure = plot.prefix_tree(tree).figure
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=1000 / figure.get_size_inches()[0])  # pixels across
    PIL.Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)
    return tree, figure


@pytest.fixture(scope="module")
def problem():
    lm = table_lm(4, 4, max_prompt=2, concentration=1.0, seed=3)
    other = table_lm(
        4, 4, max_prompt=2
    )  # uniform, so that no text's weight is above 35: errors of few large ones mislead
    other.vocabulary = lm.vocabulary
    return bind(tilted, lm, reward=letters, beta=0.3), bind(finetuned, other)


def scores(tree, law, truth, log_p, b):
    """Of each node's mass, how many standard errors it is off; the root's is 1 and has none."""
    x = truth.latents["x"][:, b]
    off = []
    for prefix, data in tree.nodes(data=True):
        begins = (x[:, : len(prefix)] == torch.tensor(prefix, dtype=x.dtype)).all(-1)
        mass = float(log_p[begins, b].exp().sum())
        if not prefix:
            assert data[law] == pytest.approx(mass, abs=1e-9) and data[law] == pytest.approx(1)
        elif data[law]:
            off.append((data[law] - mass) / data[f"{law}_se"])
        else:  # its error is 0, too: that of 1,000 draws, fewer than any of these are worth
            off.append((1000 * mass) ** 0.5)
    return torch.tensor(off).abs()


def by_rejection(target, guide):
    return rejection(target, None, ["", "a"], num_samples=3000)


def by_importance(target, guide):
    return importance(target, guide, ["", "a"], num_samples=6000)


@cache
def by_chains(target, guide):
    nearer = bind(finetuned, target.lm.copy())  # of chains that stand still for long no batch is long enough
    return mcmc(target, nearer, ["", "a"], num_samples=900, warmup=50, num_chains=4)


@cache
def by_particles(target, guide):
    return smc(target, None, ["", "a"], num_samples=64, num_runs=150)


@pytest.mark.parametrize("sampler", [by_rejection, by_importance, by_chains, by_particles])
@pytest.mark.parametrize("b", [0, 1])
def test_masses_are_the_enumerated_ones(problem, sampler, b):
    target, guide = problem
    truth = enumerate_posterior(target, guide, ["", "a"])
    log_prior = truth.log_joint.detach() - truth.records["reward"] / 0.3
    prior = importance(target, None, ["", "a"], num_samples=3000)
    proposed, drawn = importance(target, guide, ["", "a"], num_samples=3000), sampler(target, guide)
    tree = prefix_tree(prior, proposed, drawn, prompt=b)
    assert tree.graph["laws"] == ("prior", "guide", "posterior") and 20 < len(tree) <= 40
    log_posterior = truth.log_posterior.detach()
    for law, log_p in (("prior", log_prior), ("guide", truth.log_q.detach()), ("posterior", log_posterior)):
        off = scores(tree, law, truth, log_p, b)
        print(f"{law}: {len(off)} masses, mean square {off.square().mean():.2f}, worst {off.max():.1f} SE")
        assert off.max() < BOUND and off.square().mean() < 3
    assert scores(tree, "prior", truth, log_posterior, b).max() > BOUND, "the mutant: the prior's masses"
    if sampler is by_importance:
        unweighted = prefix_tree(prior, None, replace(drawn, kind="exact"), prompt=b)
        assert scores(unweighted, "posterior", truth, log_posterior, b).max() > BOUND, "the mutant: no weights"


def follows_the_laws(tree, masses_from, max_nodes, min_mass):
    assert networkx.is_arborescence(tree) and len(tree) <= max_nodes and next(iter(tree)) == ()
    for law in tree.graph["laws"]:
        for node, data in tree.nodes(data=True):
            assert data[f"rest_{law}"] >= 0 and data[f"{law}_se"] >= 0
            if data["over"]:
                assert not tree[node] and data[f"rest_{law}"] == 0
            else:
                below = sum(tree.nodes[c][law] for c in tree.successors(node)) + data[f"rest_{law}"]
                assert below == pytest.approx(data[law], abs=1e-12)
    for node, data in tree.nodes(data=True):
        assert data["depth"] == len(node) and data["token"] == (node[-1] if node else None)
        assert not node or max(data[law] for law in tree.graph["laws"]) >= min_mass - 1e-12
        path = networkx.shortest_path(tree, (), node)
        (whole,) = masses_from.prompts.vocabulary.decode(torch.tensor([node])) if node else ("",)
        assert "".join(tree.nodes[n]["text"] for n in path) == whole


TOKENS = st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None)
@given(TOKENS, TOKENS, st.integers(1, 50), st.sampled_from([0.001, 0.05, 0.3]), st.integers(0, 2**31))
def test_children_and_rest_sum_to_the_node(ones, others, max_nodes, min_mass, seed):
    lm = LM

    def draws(rows):
        x = torch.tensor(rows)
        x = torch.where(lm.vocabulary.alive(x), x, lm.vocabulary.pad_id)
        made = TWO.map(lambda v: v[:, :1].expand(1, len(rows), *v.shape[2:]))
        w = torch.randn(1, len(rows), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
        return replace(made, latents={"x": x[None, :, None]}, log_likelihood=w)

    prior, other = draws(ones), draws(others)
    tree = prefix_tree(prior, other, other, max_nodes=max_nodes, min_mass=min_mass)
    follows_the_laws(tree, prior, max_nodes, min_mass)


LM = table_lm(4, 4, concentration=1.0)
TWO = importance(bind(tilted, LM, reward=letters), None, [""], num_samples=2)


def test_chains_are_one_node_and_ends_are_leaves():
    end = LM.vocabulary.end_ids[0]
    rows = torch.tensor([[0, 1, 2, end]] * 60 + [[0, 1, 1, 1]] * 38 + [[2, 2, 2, 2]] * 2)
    some = TWO.map(lambda v: v[:, :1].expand(1, 100, *v.shape[2:]))
    tree = prefix_tree(replace(some, latents={"x": rows[None, :, None]}), min_mass=0.03)
    assert [*tree] == [(), (0, 1), (0, 1, 2, end), (0, 1, 1, 1)]
    assert [tree.nodes[n]["over"] for n in tree] == [None, None, "end", "truncated"]
    assert [round(tree.nodes[n]["prior"], 9) for n in tree] == [1, 0.98, 0.6, 0.38]
    assert tree.nodes[()]["rest_prior"] == pytest.approx(0.02) and tree.nodes[(0, 1)]["rest_prior"] == 0
    se = (0.6 * 0.4 / 99) ** 0.5  # of a share
    assert tree.nodes[(0, 1, 2, end)]["prior_se"] == pytest.approx(se)


def test_a_character_in_two_tokens_is_shown_once_it_is_whole():
    lm = LanguageModel.from_pretrained(max_new_tokens=6)
    target = bind(tilted, lm, reward=letters)
    few = importance(target, None, [""], num_samples=4)
    ids = [lm.vocabulary.plain(text) for text in ("é", "è")]
    assert [len(i) for i in ids] == [2, 2] and ids[0][0] == ids[1][0]
    x = torch.full((4, 6), lm.vocabulary.pad_id)
    for n, row in enumerate([ids[0], ids[1]] * 2):
        x[n, : len(row)], x[n, len(row)] = torch.tensor(row), lm.vocabulary.end_ids[0]
    tree = prefix_tree(replace(few, latents={"x": x[None, :, None]}))
    assert [tree.nodes[n]["text"] for n in tree] == ["", "", "é", "è"] or [tree.nodes[n]["text"] for n in tree][2:] == [
        "è",
        "é",
    ]


def test_draws_of_another_law_are_refused(problem):
    target, guide = problem
    prior, fair = importance(target, None, ["", "a"], num_samples=50), by_rejection(target, guide)
    with pytest.raises(ValueError, match="model's prior"):
        prefix_tree(importance(target, guide, ["", "a"], num_samples=50))
    with pytest.raises(ValueError, match="model's prior"):
        prefix_tree(fair)
    with pytest.raises(ValueError, match="the guide: "):
        prefix_tree(prior, fair)
    with pytest.raises(ValueError, match="prompt=2"):
        prefix_tree(prior, prompt=2)
    with pytest.raises(ValueError, match="give draws for the same prompts"):
        prefix_tree(prior, None, rejection(target, None, ["b"], num_samples=50))
    with pytest.raises(ValueError, match="min_mass=0"):
        prefix_tree(prior, min_mass=0)
    never = bind(constrained, target.lm, constraint=lambda completions, **_: [False] * len(completions))
    with pytest.raises(ValueError, match="all weights are zero"):
        prefix_tree(prior, None, importance(never, None, ["", "a"], num_samples=50))


def edges(graph, known=True):
    return {(a, b) for a, b, k in graph.edges(data="known") if k is known}


def kinds(graph):
    return dict(graph.nodes(data="kind"))


def test_shipped_models(problem):
    lm = problem[0].lm
    graph = model_graph(problem[0], ["", "a"])
    assert edges(graph) == {("x", "reward"), ("reward", "optimal")} and not edges(graph, known=False)
    assert kinds(graph) == {"x": "latent", "reward": "deterministic", "optimal": "observed"}
    assert graph.nodes["x"] == {"kind": "latent", "distribution": "TokenSequence", "plates": ("prompts",)}
    assert graph.graph["plates"] == {"prompts": 2} and graph.nodes["optimal"]["distribution"] == "Optimality"
    graph = model_graph(bind(constrained, lm, constraint=lambda completions, **_: [True] * len(completions)), [""])
    assert edges(graph) == {("x", "holds"), ("holds", "satisfied")} and not edges(graph, known=False)
    graph = model_graph(bind(power, lm), [""])
    assert edges(graph) == {("x", "likely")} == {*graph.edges}
    assert {*model_graph(bind(finetuned, lm.copy()), [""])} == {"x"}


def test_texts_and_other_latents():
    def two(prompts, prior, reward):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prompts))
            y = pyro.sample("y", prior(prompts.append(x)))
            with pyro.plate("raters", 3):
                pyro.sample("rating", dist.Normal(reward(prompts, y) * z, 1.0), obs=torch.zeros(3, len(prompts)))
            pyro.factor("more", reward(prompts, x))

    graph = model_graph(bind(two, table_lm(4, 3, max_prompt=8), reward=letters), ["", "a"])
    assert {*graph.edges} == edges(graph) == {("x", "y"), ("y", "rating"), ("z", "rating"), ("x", "more")}
    assert graph.nodes["rating"]["plates"] == ("prompts", "raters") and graph.nodes["z"]["plates"] == ()
    assert kinds(graph) == {"z": "latent", "x": "latent", "y": "latent", "rating": "observed", "more": "observed"}


def test_a_reward_depends_on_the_texts_in_its_prompts():
    """With the provenance of the completions alone the edge from the rationale was missing."""

    def reasoned(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts)):
            rationale = pyro.sample("rationale", prior(prompts))
            answer = pyro.sample("answer", prior(prompts.append(rationale)))
            log_potential = reward(prompts.append(rationale), answer)
            pyro.sample("optimal", Optimality(log_potential), obs=torch.ones_like(log_potential))

    lm = table_lm(4, 3, max_prompt=4)
    for reward in (letters, BestOfN(letters, lm, n=2, num_references=8)):
        graph = model_graph(bind(reasoned, lm, reward=reward), ["", "a"])
        assert {*graph.edges} == edges(graph)
        assert edges(graph) == {("rationale", "answer"), ("rationale", "optimal"), ("answer", "optimal")}


def test_what_a_program_decodes_is_not_seen():
    def program(prompts, prior):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prompts))
            pyro.sample("y", prior(prior.prompts([text[:1] for text in prompts.decode(x)])))

    assert not model_graph(bind(program, LM_OF_TWO), ["", "a"]).edges


def test_a_plain_pyro_program_with_plates():
    def topics(documents):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("documents", 4):
            topic = pyro.sample("topic", dist.Categorical(w))
            with pyro.plate("words", 5):
                pyro.sample("word", dist.Normal(mu[topic], 1.0).mask(True), obs=torch.zeros(5, 4))

    state = torch.random.get_rng_state()
    graph = model_graph(topics, None)
    assert torch.equal(state, torch.random.get_rng_state())
    assert {*graph.edges} == edges(graph) == {("w", "topic"), ("mu", "word"), ("topic", "word")}
    assert dict(graph.nodes(data="distribution")) == {
        "w": "Dirichlet",
        "mu": "Normal",
        "topic": "Categorical",
        "word": "Normal",
    }
    assert graph.nodes["word"]["plates"] == ("documents", "words") and graph.graph["plates"] == {
        "documents": 4,
        "words": 5,
    }


def test_a_value_that_leaves_the_tensors_may_matter():
    def program(prompts, prior, use):
        topic = pyro.sample("topic", dist.Categorical(torch.ones(2)))
        before = pyro.sample("before", dist.Normal(0.0, 1.0))
        word = use(topic)
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prior.prompts([word] * len(prompts))))
            pyro.sample("o", dist.Normal(before + x.sum(-1), 1.0), obs=torch.zeros(len(prompts)))

    def edges_with(use):
        graph = model_graph(bind(program, LM_OF_TWO, use=use), [""])
        assert edges(graph) == {("before", "o"), ("x", "o")}
        return edges(graph, known=False)

    ways = [lambda t: "ab"[int(t)], lambda t: "ab"[t], lambda t: "a" if t > 0 else "b", lambda t: f"a{t}"[0]]
    for use in (*ways, lambda t: "ab"[t.item()], lambda t: "ab"[t.numpy()], lambda t: "ab"[t.tolist()]):
        assert edges_with(use) == {("topic", "x")}
    assert edges_with(lambda t: "a") == set()


LM_OF_TWO = table_lm(4, 3, max_prompt=3)


def accepts(graph, tokens):
    state = 0
    for token in tokens:
        state = next((to for _, to, ids in graph.out_edges(state, data="tokens") if token in ids), None)
        if state is None:
            return False
    return graph.nodes[state]["accepting"]


def test_an_automatons_graph_accepts_what_it_accepts():
    vocabulary, end = LM.vocabulary, LM.vocabulary.end_ids[0]
    ways = [(0, 1, ["a", "b", "c"]), (1, 1, "a"), (1, 2, "c"), (0, 3, 1)]
    moves = networkx.DiGraph([(one, two, {"token": token}) for one, two, token in ways])
    automaton = Automaton.graph(moves, 0, [2], vocabulary)
    graph = automaton_graph(automaton)
    assert [n for n, start in graph.nodes(data="start") if start] == [0] and len(graph) < len(moves) + 1
    for n in range(4):
        for text in itertools.product(range(3), repeat=n):
            row = torch.tensor([*text, *[end] * (4 - n)]) if n < 4 else None
            if row is not None:
                assert accepts(graph, text) == bool(automaton.holds(row)), text
    plot.automaton(graph).figure.canvas.draw()


def test_short_cuts_are_left_out_of_a_regular_expressions_graph():
    pytest.importorskip("outlines_core")
    lm = LanguageModel.from_pretrained(max_new_tokens=8)
    graph = automaton_graph(Automaton.regex(" (good|bad)[0-9a-z\n\t]?", lm.vocabulary))
    labels = {text for _, _, text in graph.edges(data="label")}
    assert labels == {"␣", "g", "b", "o", "a", "d", "a–z, 0–9, \\t, \\n"}
    assert sum(accepting for _, accepting in graph.nodes(data="accepting")) >= 1
    byte = {piece: lm.vocabulary.plain(piece)[-1] for piece in "gobad9"} | {
        " ": lm.vocabulary.tokenizer.get_vocab()["Ġ"]
    }
    words = {" good": True, " bad": True, " bad9": True, " goo": False, "good": False, " bad99": False}
    for word, right in words.items():
        assert accepts(graph, [byte[c] for c in word]) == right, word


def test_labels_are_printable():
    assert label([b"\n", b"\x1b", b"\x07", b"\xff", b" ", b","]) == "\\x07, \\n, \\x1b, ␣, comma, 0xFF"
    assert label([bytes([b]) for b in range(256)]) == "any byte"
    assert label([bytes([b]) for b in range(256) if b != 10]) == "any byte but \\n"
    assert label(["\u202eab".encode()]) == "U+202Eab"
    assert label([bytes([b, b]) for b in b"abcdefghi"]).endswith("and 3 more")
    assert label([b"a", b"b"]) == "a, b" and label([b"x", b"y", b"z"]) == "x–z"


HOSTILE = "$x^2$ \u202egnp\x1b[31m $\\frac{1}{0}$ \n\u200b"


def texts(figure):
    import matplotlib.text

    return [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text()]


@pytest.mark.parametrize("usetex", [False, True])
def test_text_is_never_markup(problem, usetex):
    prior = importance(problem[0], None, [""], num_samples=50)
    tree = prefix_tree(prior, None, prior)
    tree.graph["prompt"] = HOSTILE
    for _, data in tree.nodes(data=True):
        data["text"] = HOSTILE
    model = networkx.DiGraph(plates={HOSTILE: 2})
    model.add_node(HOSTILE, kind="latent", distribution="Normal", plates=(HOSTILE,))
    automaton = networkx.DiGraph([(0, 1, {"label": HOSTILE})])
    for n in (0, 1):
        automaton.add_node(n, start=n == 0, accepting=n == 1)
    with matplotlib.rc_context({"text.usetex": usetex}):
        for figure in (plot.prefix_tree(tree).figure, plot.model(model).figure, plot.automaton(automaton).figure):
            figure.canvas.draw()
            found = texts(figure)
            shown = " ".join(t.get_text() for t in found)
            assert "$x^2$" in shown and not any(c in shown for c in "\u202e\x1b\n\u200b")
            assert not any(t.get_parse_math() or t.get_usetex() for t in found)


def overlaps(figure):
    figure.canvas.draw()
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts(figure)]
    pairs = itertools.combinations(boxes, 2)
    return [(a, b) for (a, one), (b, two) in pairs if one.shrunk(0.98, 0.7).overlaps(two.shrunk(0.98, 0.7))]


def test_a_tree_in_a_given_figure_and_without_a_posterior(problem):
    prior = importance(problem[0], None, [""], num_samples=400)
    guide = importance(*problem, [""], num_samples=400)
    for others in ((), (guide,), (guide, guide)):
        figure = matplotlib.figure.Figure((9, 7))
        ax = figure.add_subplot()
        assert plot.prefix_tree(prefix_tree(prior, *others), ax) is ax and not overlaps(figure)
    alone = plot.prefix_tree(prefix_tree(prior, max_nodes=1))
    assert not overlaps(alone.figure)


SHADES = [_shades("posterior")(n / 10) for n in range(-30, 31)]


def curves(tree):
    """Colours of the branches."""
    return [patch.get_edgecolor() for patch in plot.prefix_tree(tree).patches if isinstance(patch, PathPatch)]


def test_what_may_be_noise_has_no_colour(problem):
    pyro.set_rng_seed(6)
    target, _ = problem
    prior = importance(target, None, [""], num_samples=400)
    again = replace(importance(target, None, [""], num_samples=400), kind="exact")
    moved = rejection(target, None, [""], num_samples=400)
    still, changed = curves(prefix_tree(prior, None, again)), curves(prefix_tree(prior, None, moved))
    (neutral,) = {colour for colour in still if still.count(colour) > len(still) / 2}
    assert sum(colour != neutral for colour in still) <= 2 < len(still) / 5  # by errors of either: one in 200
    assert sum(colour != neutral for colour in changed) > len(changed) / 5


def test_the_least_ratio_is_what_wilsons_intervals_allow():
    def tree(before, after, worth):
        g = networkx.DiGraph(laws=("prior", "posterior"), prompt="", worth={"prior": 10_000.0, "posterior": worth})
        g.add_node((), text="", over=None, prior=1.0, prior_se=0.0, posterior=1.0, posterior_se=0.0)
        errors = [(m * (1 - m) / n) ** 0.5 for m, n in ((before, 10_000), (after, worth))]
        g.add_node((1,), text="a", over=None, prior=before, prior_se=errors[0], posterior=after, posterior_se=errors[1])
        g.add_edge((), (1,))
        for data in g.nodes.values():
            data |= {"rest_prior": 0.0, "rest_posterior": 0.0}
        (colour,) = curves(g)
        return SHADES.index(
            min(SHADES, key=lambda shade: sum((a - b) ** 2 for a, b in zip(shade, colour, strict=True)))
        )

    assert tree(0.1, 0.1, 1000) == 30 and tree(0.01, 0.9, 1000) == 60 and tree(0.9, 0.0, 1000) == 0
    assert tree(0.05, 0.0, 1000) < 10 and tree(0.05, 0.0, 40) == 30, "one in eight such draws would not have seen it"
    assert tree(0.05, 0.9, 2) < 60 == tree(0.05, 0.9, 100), "of two draws the ratio is hardly known"
    assert tree(0.1, 0.2, 10_000) in (38, 39), "×2, less two errors of each: 0.192 / 0.106 = 2**0.86"


def test_the_readmes_tree(tmp_path):
    pyro.set_rng_seed(0)
    tree, figure = picture(tmp_path / "tree.png", num_samples=500)
    assert 1000 < (tmp_path / "tree.png").stat().st_size < 150_000 and not overlaps(figure)
    lovely = next(data for _, data in tree.nodes(data=True) if data["text"].strip() == "lovely")
    grown, se = lovely["posterior"] - lovely["prior"], (lovely["posterior_se"] ** 2 + lovely["prior_se"] ** 2) ** 0.5
    assert 0 < 2 * se < grown < 0.1
