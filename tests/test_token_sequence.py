"""`TokenSequence` against enumeration: a table wrapped as a Hugging Face module, so that the production path runs."""

import itertools

import oracle
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceEnum_ELBO
from scipy.stats import chi2

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.table import table_lm
from ppl_lm.lm.token_sequence import TokenSequence, _sum_of_bits

V, T, END = 5, 6, 4
ROWS = oracle.outcomes(V, T, END)
X = oracle.as_tensor(ROWS, T, END)
CONTEXTS = {"bos": [[END]], "two tokens": [[0, 1]], "left-padded batch": [[END], [0, 1]]}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return table_lm(V, T, max_prompt=2, concentration=0.7)


@pytest.fixture(scope="module", params=CONTEXTS)
def case(request, lm):
    """A distribution, and the exact log-probability of every outcome for each of its prompts, (N, B)."""
    contexts = CONTEXTS[request.param]
    exact = torch.stack([oracle.log_probs(lm.model.table, tuple(c), ROWS).detach() for c in contexts], 1)
    return lm(Prompts.from_ids(contexts, lm.vocabulary)), exact


# ----- log_prob -----


def test_mass_is_one_and_log_prob_is_the_walk_through_the_table(case):
    """Catches prompt tokens in the sum, a dropped end token, a truncated text scored as finished, padding attended to."""
    d, exact = case
    log_p = d.log_prob(X.unsqueeze(1))  # (N, B)
    assert log_p.dtype == torch.float64
    torch.testing.assert_close(log_p, exact, atol=1e-10, rtol=0)
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(d.batch_shape, dtype=torch.float64), atol=1e-10, rtol=0)


def test_truncated_texts_are_outcomes_of_their_own(case):
    """Catches the missing (or invented) end factor: what is truncated has the mass that is left at step T."""
    d, exact = case
    truncated = torch.tensor([END not in row for row in ROWS])
    mass = d.log_prob(X[truncated].unsqueeze(1)).exp().sum(0)
    torch.testing.assert_close(mass, exact[truncated].exp().sum(0), atol=1e-10, rtol=0)
    assert bool((mass > 1e-4).all())


def test_token_log_probs_add_up_and_are_zero_after_the_end(case):
    d, exact = case
    by_token = d.token_log_probs(X.unsqueeze(1))
    torch.testing.assert_close(by_token.sum(-1), exact, atol=1e-10, rtol=0)
    assert by_token.masked_select(~d.lm.vocabulary.alive(X).unsqueeze(1)).abs().max() == 0


@pytest.mark.parametrize(
    "bad", [[0, END, 0, END, END, END], [END, END, END, END, END, 1], [0, 1, 2, 3, 0, 5], [-1] * T]
)
def test_what_is_not_canonical_is_impossible(case, bad):
    """Tokens after the end, or ids that do not exist; the gradient stays finite."""
    d, _ = case
    values = torch.tensor([bad, [0, 1, END, END, END, END]]).unsqueeze(1)
    log_p = d.log_prob(values)
    assert bool((log_p[0] == -torch.inf).all()) and bool(log_p[1].isfinite().all())
    trainable = d.lm.copy()
    log_p = trainable(d.prompts).log_prob(values)
    (gradient,) = torch.autograd.grad(log_p[log_p.isfinite()].sum(), trainable.model.table)
    assert bool(gradient.isfinite().all())


def test_values_of_another_shape_or_type_are_refused(case, unchecked):
    d, _ = case
    for bad in (X[0, :-1], torch.cat([X[0], X[0]]), X[0].double(), X[0].int(), torch.tensor(1)):
        with pytest.raises(ValueError, match=r"completions here are int64 of shape \(..., 6\)"):
            d.log_prob(bad)


def test_gradient_is_that_of_the_walk():
    """Through log_prob, micro-batched or not: catches a pass that forgets autograd or counts a row twice."""
    lm = table_lm(3, 3, max_prompt=2, concentration=1.0).copy()
    rows = oracle.outcomes(3, 3, 2)
    x = oracle.as_tensor(rows, 3, 2)
    weight = torch.randn(len(rows), dtype=torch.float64)
    (exact,) = torch.autograd.grad((weight * oracle.log_probs(lm.model.table, (0, 1), rows)).sum(), lm.model.table)
    d = lm(Prompts.from_ids([[0, 1]], lm.vocabulary))
    (found,) = torch.autograd.grad((weight * d.log_prob(x.unsqueeze(1)).squeeze(1)).sum(), lm.model.table)
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)


def test_prompts_of_two_dimensions(lm):
    """(K, B) prompts, each with its own context, as for a text prompted by another text."""
    contexts = [[END], [0, 1], [2], [3, 3], [1], [END]]
    d = lm(Prompts.from_ids(contexts, lm.vocabulary).reshape(torch.Size((3, 2))))
    assert d.batch_shape == (3, 2) and d.sample().shape == (3, 2, T) and d.sample((4,)).shape == (4, 3, 2, T)
    x = X[::50]
    log_p = d.log_prob(x[:, None, None])
    for i, context in enumerate(contexts):
        exact = oracle.log_probs(lm.model.table, tuple(context), [ROWS[j] for j in range(0, len(ROWS), 50)])
        torch.testing.assert_close(log_p[:, i // 2, i % 2], exact.detach(), atol=1e-10, rtol=0)


def test_slices_and_expansions_keep_each_row_with_its_prompt(lm):
    d = lm(Prompts.from_ids([[END], [0, 1]], lm.vocabulary))
    wide = d.expand((3, 2))
    x = wide.sample()
    assert wide.batch_shape == (3, 2) and x.shape == (3, 2, T)
    torch.testing.assert_close(wide.log_prob(x), d.log_prob(x), atol=1e-12, rtol=0)
    rows = torch.tensor([5, 0, 3])
    part = wide.slice(rows)
    assert part.batch_shape == (3,)
    picked = x.reshape(-1, T)[rows]
    torch.testing.assert_close(part.log_prob(picked), d.log_prob(x).reshape(-1)[rows], atol=1e-12, rtol=0)
    assert wide.expand((4, 3, 2)).sample().shape == (4, 3, 2, T)


# ----- sampling -----


def g_test(x: torch.Tensor, exact: torch.Tensor) -> float:
    """p-value of draws (N, T) against the exact law of all outcomes; cells of less than 5 expected draws are merged."""
    index = {tuple(row): i for i, row in enumerate(X.tolist())}
    counts = torch.zeros(len(X), dtype=torch.float64)
    for row in x.tolist():
        counts[index[tuple(row)]] += 1  # a KeyError is an outcome that does not exist
    expected = exact.exp() * len(x)
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    g = 2 * torch.special.xlogy(counts, counts / expected).sum()
    return float(chi2.sf(float(g), len(counts) - 1))


def test_draws_follow_the_exact_law(case):
    d, exact = case
    x = d.sample((20_000,))  # (N, B, T)
    for b in range(d.batch_shape[0]):
        assert g_test(x[:, b], exact[:, b]) > 1e-5


@pytest.mark.parametrize("mutant", ["temperature 0.9", "top-k", "forgets the prompt"])
def test_the_law_of_mutants_is_rejected(case, monkeypatch, mutant):
    d, exact = case
    right = LanguageModel.logits_next

    def wrong(self, **inputs):
        log_probs, cache = right(self, **inputs)
        if mutant == "temperature 0.9":
            log_probs = (log_probs / 0.9).log_softmax(-1)
        if mutant == "top-k":
            log_probs = log_probs.masked_fill(log_probs == log_probs.amin(-1, keepdim=True), -torch.inf).log_softmax(-1)
        if mutant == "forgets the prompt":
            log_probs = log_probs.roll(1, 0) if len(log_probs) > 1 else log_probs.flip(-1)
        return log_probs, cache

    monkeypatch.setattr(LanguageModel, "logits_next", wrong)
    x = d.sample((20_000,))
    assert min(g_test(x[:, b], exact[:, b]) for b in range(d.batch_shape[0])) < 1e-5
    drawn = d.sampled_log_probs(x)
    assert drawn is not None and (drawn - d.token_log_probs(x)).abs().max() > 1e-2  # what the self-check looks at


def test_draws_are_scored_as_drawn(case):
    d, _ = case
    x = d.sample((500,))
    drawn = d.sampled_log_probs(x)
    assert drawn is not None and drawn.dtype == torch.float64
    torch.testing.assert_close(drawn, d.token_log_probs(x), atol=1e-10, rtol=0)
    assert bool(d.lm.vocabulary.is_canonical(x).all())


def test_the_seed_alone_repeats_a_draw_and_passes_change_nothing(case, monkeypatch):
    """How many rows a pass takes, and when finished ones are dropped, is invisible."""
    d, _ = case
    pyro.set_rng_seed(3)
    x = d.sample((200,))
    log_p = d.log_prob(x)
    for size in (1, 7, 64):
        monkeypatch.setattr(LanguageModel, "rows_per_pass", lambda self, *a, size=size, **k: size)
        pyro.set_rng_seed(3)
        again = d.sample((200,))
        assert again.equal(x)
        torch.testing.assert_close(d.log_prob(x), log_p, atol=1e-12, rtol=0)


def test_prompts_padded_more_are_the_same_prompts(lm):
    """Catches positions or masks that count padding, or columns cut from the wrong side."""
    tight = Prompts.from_ids([[3]], lm.vocabulary)
    loose = Prompts.from_ids([[3], [0, 1]], lm.vocabulary)
    x = X[::40, None]
    torch.testing.assert_close(lm(loose).log_prob(x)[:, 0], lm(tight).log_prob(x)[:, 0], atol=1e-12, rtol=0)
    noisy = Prompts(torch.tensor([[2, 3], [0, 1]]), loose.lengths, loose.texts, lm.vocabulary)
    assert lm(noisy).log_prob(x).equal(lm(loose).log_prob(x))


@pytest.mark.parametrize(
    "change", ["adam", "fused adam", "sgd foreach", "pyro's ClippedAdam", "data", "load_state_dict"]
)
def test_scores_kept_from_drawing_do_not_outlive_the_weights(lm, change):
    """Catches an importance ratio of the guide before the step with the guide after it."""
    twin = lm.copy()
    d = twin(Prompts.from_ids([[END]], lm.vocabulary))
    x = d.sample((3,))
    assert d.sampled_log_probs(x) is not None
    assert d.sampled_log_probs(x.clone()) is None
    if change == "data":
        twin.model.table.data[0, 0] += 1.0
    elif change == "load_state_dict":
        twin.load_state_dict(lm.state_dict())
    else:
        made = {
            "adam": lambda p: torch.optim.Adam(p),
            "fused adam": lambda p: torch.optim.Adam(p, fused=True),
            "pyro's ClippedAdam": lambda p: pyro.optim.clipped_adam.ClippedAdam(p),
            "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
        }[change]
        optimiser = made(twin.parameters())
        (-d.log_prob(x).sum()).backward()
        assert d.sampled_log_probs(x) is not None  # a gradient alone changes nothing
        optimiser.step()
    assert d.sampled_log_probs(x) is None


def test_no_prompts_give_no_texts(lm):
    for model in (lm, tiny.language_model("llama")):
        d = model([])
        x = d.sample()
        assert x.shape == (0, model.max_new_tokens) and x.dtype == torch.int64
        assert d.log_prob(x).shape == (0,) and d.sample((3,)).shape == (3, 0, model.max_new_tokens)


# ----- end tokens and padding -----


def outcomes_of(size: int, steps: int, ends: set[int]) -> list[tuple[int, ...]]:
    letters = [i for i in range(size) if i not in ends]
    finished = [
        (*head, end) for n in range(steps) for head in itertools.product(letters, repeat=n) for end in sorted(ends)
    ]
    return finished + list(itertools.product(letters, repeat=steps))


@pytest.mark.parametrize("pad", [0, 3, 4], ids=["pad is a letter", "pad is an end", "pad is the other end"])
def test_each_of_several_ends_stops_and_is_scored_as_itself(pad):
    """Catches one end token honoured of two, the first scored for all, and masks that compare ids with pad."""
    lm = tiny.table(5, 4, [3, 4], pad=pad)
    assert lm.vocabulary.end_ids == (3, 4) and lm.vocabulary.pad_id == pad
    rows = outcomes_of(5, 4, {3, 4})
    x = oracle.as_tensor(rows, 4, pad)
    contexts = [(0,), (0, 0), (2, 1)]  # with pad 0, the first two differ in length alone
    d = lm(Prompts.from_ids(contexts, lm.vocabulary))
    exact = torch.stack([oracle.log_probs(lm.model.table, c, rows).detach() for c in contexts], 1)
    log_p = d.log_prob(x.unsqueeze(1))
    torch.testing.assert_close(log_p, exact, atol=1e-10, rtol=0)
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(3, dtype=torch.float64), atol=1e-10, rtol=0)
    assert x.unique(dim=0).shape == d.enumerate_support(expand=False)[:, 0].unique(dim=0).shape
    drawn = d.sample((300,))
    known = {tuple(row) for row in x.tolist()}
    assert all(tuple(row) in known for row in drawn.reshape(-1, 4).tolist())
    torch.testing.assert_close(d.sampled_log_probs(drawn), d.token_log_probs(drawn), atol=1e-10, rtol=0)
    assert lm.vocabulary.lengths(torch.tensor([[0, 0, 0, 0], [0, 4, pad, pad], [3, pad, pad, pad]])).tolist() == [
        4,
        2,
        1,
    ]


# ----- enumeration -----


@pytest.mark.parametrize("shape", [(), (2,), (3, 2)])
def test_enumerated_support_is_complete_and_in_order(lm, shape):
    d = lm(Prompts.from_ids([[END], [0, 1]], lm.vocabulary))
    d = d.expand(shape) if len(shape) > 1 else (d if shape else d.slice(torch.tensor([0])))
    assert d.has_enumerate_support and TokenSequence.support.is_discrete
    narrow = d.enumerate_support(expand=False)
    assert narrow.shape == (len(X), *[1] * len(d.batch_shape), T)
    assert narrow.reshape(-1, T).equal(X)  # by length, then as the oracle lists them; each once
    wide = d.enumerate_support()
    assert wide.shape == (len(X), *d.batch_shape, T) and wide.equal(narrow.expand(wide.shape))


def test_real_vocabularies_are_not_enumerated():
    d = tiny.language_model("gpt2")(["the soup"])
    assert not d.has_enumerate_support
    with pytest.raises(NotImplementedError, match="300 tokens at 8 positions are too many outcomes"):
        d.enumerate_support()


# ----- in Pyro programs -----

PROMPTS = [[END], [0, 1]]
SEEN = torch.tensor([1.3, 0.2], dtype=torch.float64)


def counts_a(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == 0, 1.0, 0.0).sum(-1).double()


def program(lm, seen=SEEN):
    """A text, and a noisy count of its letters a."""
    with pyro.plate("prompts", len(PROMPTS)):
        x = pyro.sample("x", lm(Prompts.from_ids(PROMPTS, lm.vocabulary)), infer={"enumerate": "parallel"})
        pyro.sample("seen", dist.Normal(counts_a(x), 0.8), obs=seen)
    return x


def exact_log_evidence(lm) -> torch.Tensor:
    log_p = torch.stack([oracle.log_probs(lm.model.table, tuple(c), ROWS).detach() for c in PROMPTS], 1)
    return (log_p + dist.Normal(counts_a(X).unsqueeze(1), 0.8).log_prob(SEEN)).logsumexp(0)


@pytest.mark.parametrize("particles", [1, 2])
def test_pyro_enumerates_texts_exactly(lm, particles):
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=particles, vectorize_particles=True)
    loss = elbo.loss(program, lambda lm: None, lm)
    assert loss == pytest.approx(-float(exact_log_evidence(lm).sum()), abs=1e-9)


def test_condition_and_replay_leave_token_ids_alone(lm):
    x = torch.stack([X[7], X[1500]])
    trace = poutine.trace(poutine.condition(program, {"x": x})).get_trace(lm)
    assert trace.nodes["x"]["value"] is x and trace.nodes["x"]["is_observed"]
    pairs = ((PROMPTS[0], ROWS[7]), (PROMPTS[1], ROWS[1500]))
    exact = torch.stack([oracle.log_prob(lm.model.table, tuple(context), row) for context, row in pairs])
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], exact.detach(), atol=1e-10, rtol=0)


def test_masks_and_scales_apply_to_whole_texts(lm):
    x = torch.stack([X[7], X[1500]])
    mask, scale = torch.tensor([True, False]), torch.tensor([3.0, 2.0], dtype=torch.float64)
    conditioned = poutine.condition(program, {"x": x})

    def log_prob_of(model):
        trace = poutine.trace(model).get_trace(lm)
        trace.compute_log_prob()
        return trace.nodes["x"]["log_prob"]

    plain = log_prob_of(conditioned)
    assert plain.shape == (2,)
    torch.testing.assert_close(log_prob_of(poutine.mask(conditioned, mask=mask)), plain * mask)
    torch.testing.assert_close(log_prob_of(poutine.scale(conditioned, scale=scale)), plain * scale)


def test_vectorised_plates_expand_to_independent_particles(lm):
    def model():
        with pyro.plate("particles", 50, dim=-2):
            return program(lm)

    x = model()
    assert x.shape == (50, 2, T) and len(x[:, 0].unique(dim=0)) > 10


def test_predictive_draws_from_the_prior(lm):
    for parallel in (True, False):
        drawn = Predictive(program, num_samples=20, parallel=parallel)(lm, None)
        assert drawn["x"].shape == (20, 2, T) and drawn["seen"].shape == (20, 2)
        assert len(drawn["x"][:, 0].unique(dim=0)) > 5


def test_where_mixes_texts(lm):
    d = lm(Prompts.from_ids(PROMPTS, lm.vocabulary))
    a, b = d.sample((10,)), d.sample((10,))
    chosen = torch.arange(10) % 2 == 0
    mixed = torch.where(chosen[:, None, None], a, b)
    expected = torch.where(chosen[:, None], d.log_prob(a), d.log_prob(b))
    torch.testing.assert_close(d.log_prob(mixed), expected, atol=1e-12, rtol=0)


# ----- refusals -----


def test_a_context_overflow_is_refused_when_the_distribution_is_made(lm):
    with pytest.raises(ValueError, match=r"prompt of 3 tokens and max_new_tokens=6 need 9 positions; this model has 8"):
        lm(["a b c"])
    assert lm(["a b"]).batch_shape == (1,)


def test_weights_that_became_nan_are_an_error_at_every_door(lm):
    """Catches NaN log-probabilities that leave the distribution, and draws of token 0 from them."""
    twin = lm.copy()
    d = twin(Prompts.from_ids(PROMPTS, lm.vocabulary))
    x = d.sample()
    with torch.no_grad():
        twin.model.table.fill_(torch.nan)
    for door in (d.sample, lambda: d.log_prob(x), lambda: d.token_log_probs(x)):
        with pytest.raises(ValueError, match="logits hold NaN"):
            door()


# ----- a text prompted by a text -----


def chain(lm):
    """x, then y prompted by x: two texts of one letter, so that everything can be enumerated."""
    with pyro.plate("prompts", 1):
        prompts = Prompts.from_ids([[2]], lm.vocabulary)
        x = pyro.sample("x", lm(prompts))
        y = pyro.sample("y", lm(prompts.append(x)))
    return x, y


def test_a_text_prompted_by_a_text_has_the_product_law():
    """Catches prompts of the second text that lose their particle, and an end token of the first left in the context."""
    lm = table_lm(3, 1, max_prompt=2, concentration=1.0)
    table, n = lm.model.table, 4000
    with pyro.plate("particles", n, dim=-2):
        x, y = chain(lm)
    trace = poutine.trace(chain).get_trace(lm)
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (1,)
    exact = {}
    for a, b in itertools.product(range(3), repeat=2):
        context = (2,) if a == 2 else (2, a)
        exact[a, b] = float((oracle.log_prob(table, (2,), (a,)) + oracle.log_prob(table, context, (b,))).exp())
    assert sum(exact.values()) == pytest.approx(1, abs=1e-10)
    for (a, b), p in exact.items():
        share = float(((x == a) & (y == b)).double().mean())
        assert abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5
    first = trace.nodes["x"]["value"].item(), trace.nodes["y"]["value"].item()
    assert float(trace.log_prob_sum().exp()) == pytest.approx(exact[first], abs=1e-10)


def test_provenance_passes_through_prompts_draws_and_scores(lm):
    """Pyro's TraceGraph_ELBO sees by it that y depends on x; without it, x's gradient misses the cost of y."""
    from pyro.ops.provenance import get_provenance, track_provenance

    prompts = Prompts.from_ids([[END]], lm.vocabulary)
    x = track_provenance(torch.tensor([[0, END, END, END, END, END]]), frozenset({"x"}))
    second = lm(prompts.append(x[:, :1]))
    for d in (second, second.expand((2, 1))):
        assert get_provenance(d.sample()) == get_provenance(d.log_prob(X[:1])) == frozenset({"x"})
    assert get_provenance(lm(prompts).log_prob(x)) == frozenset({"x"})
    assert get_provenance(lm(prompts).log_prob(X[:1])) == frozenset()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (4, 6)])
def test_any_number_that_is_written_changes_the_sum_of_bits(dtype, shape):
    """Of rows of a larger tensor, and of one whose dimensions were exchanged, too."""
    whole = torch.randn(3, *shape).to(dtype)
    for weight in (whole.clone()[0], whole[1], whole[2].t() if len(shape) == 2 else whole[2]):
        before = int(_sum_of_bits(weight))
        for at in range(weight.numel()):
            changed = weight.clone(memory_format=torch.contiguous_format)
            changed.view(-1)[at] = changed.view(-1)[at] + 1
            assert int(_sum_of_bits(changed)) != before
