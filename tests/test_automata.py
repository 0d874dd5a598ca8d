"""Automata over tokens: as a constraint, as a mask, and what local masking is and is not.

| what | property | tolerance |
|---|---|---|
| the constraint | a regular expression against `re.fullmatch`, a graph against its walks, on every outcome | exact |
| the mask | its language is that of brute force; whatever it lets begin can be finished within T | exact |
| local masking | a law: Σ q = 1, equal to one made from the prior's table by hand; drawn = scored, cached = uncached | 1e-10 |
| its weights | Σ q w = Z and q w / Z is the posterior by enumeration; without them it is not | 1e-10; TV > 0.05 |
| the embedded LM, stories260K | every draw matches; log Z against the prior's own | 4 SE |
"""

import math
import re
import sys

import networkx
import oracle
import pytest
import tiny
import torch
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.objectives.divergences import forward_kl
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.likelihood.automata import Automaton
from ppl_lm.lm.automaton_mask import TokenMask
from ppl_lm.lm.decoding.decoder import Decoder
from ppl_lm.lm.experts import product
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.meter import measure
from ppl_lm.lm.network import DivergedError
from ppl_lm.lm.table import TableConfig, TableForCausalLM, table_lm
from ppl_lm.lm.tokens.byte_pieces import token_bytes
from ppl_lm.lm.vocabulary import Vocabulary
from ppl_lm.models import constrained

V, T, END = 4, 4, 3
ROWS = oracle.outcomes(V, T, END)
X = oracle.as_tensor(ROWS, T, END)
TEXTS = ["the soup", "she said that it was", ""]


def each_a_before_b(lm) -> Automaton:
    """b is allowed once an a has been written, the text ends after a b, and c leads nowhere."""
    graph = networkx.MultiDiGraph()
    graph.add_edge("start", "a", token="a")
    graph.add_edge("a", "a", token=["a", 2])
    graph.add_edge("a", "b", token=1)
    graph.add_edge("b", "a", token="a")
    graph.add_edge("b", "lost", token="c")
    return Automaton.graph(graph, "start", ["b"], lm.vocabulary)


def satisfied(row: tuple[int, ...]) -> bool:
    return row[-1] == END and re.fullmatch("a[ac]*b(a[ac]*b)*", "".join("abc"[i] for i in row[:-1])) is not None


def law_by_hand(table, context, allowed) -> torch.Tensor:
    """log q of every outcome: the prior's next tokens, those that begin no allowed outcome left out, each by itself made to
    sum to one."""
    begun = {row[:n] for row in allowed for n in range(1, len(row) + 1)}
    total = []
    for row in ROWS:
        log_q = torch.zeros((), dtype=torch.float64)
        for n in range(len(row)):
            if row[: n + 1] not in begun:
                log_q = torch.tensor(-math.inf, dtype=torch.float64)
                break
            here = table[oracle.table_row((*context, *row[:n]), V)]
            open_ = [v for v in range(V) if (*row[:n], v) in begun]
            log_q = log_q + here[row[n]] - here[open_].logsumexp(0)
        total.append(log_q)
    return torch.stack(total)


def tv(log_a, log_b) -> float:
    return float(0.5 * (log_a.exp() - log_b.exp()).abs().sum())


def letters_lm(steps: int, pieces=("a", "b", "ab", "ba")) -> LanguageModel:
    """A table over pieces that write one text after another, and <end>."""
    words = [*pieces, "<end>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=pieces[0]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>")
    config = TableConfig(len(words), 1 + steps, eos_token_id=len(pieces))
    return LanguageModel(TableForCausalLM(config), tokenizer, steps)


# The constraint


PIECES = ("a", "b", "ab", "ba")
LETTERS = letters_lm(4, PIECES)
OUTCOMES = oracle.outcomes(len(PIECES) + 1, 4, len(PIECES))

regexes = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "[^a]", "ab", "a|ab", "()"]),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})")
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "??", "{2}", "{1,2}"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        )
    ),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(regexes)
def test_a_regular_expression_means_what_python_means(pattern):
    """On every outcome, in whatever pieces a text is written. Catches alternatives that are dropped once one has matched."""
    expected = [
        row[-1] == 4 and re.fullmatch(pattern, "".join(PIECES[i] for i in row[:-1])) is not None for row in OUTCOMES
    ]
    found = Automaton.regex(pattern, LETTERS.vocabulary)([list(row) for row in OUTCOMES])
    assert found == expected, pattern


def test_several_ways_to_write_one_text_are_all_allowed():
    automaton = Automaton.regex("ab", LETTERS.vocabulary)
    law = product([LETTERS, automaton.mask(LETTERS)])([""])
    x = torch.tensor([[0, 1, 4, 4], [2, 4, 4, 4]])  # a b, ab
    assert automaton.holds(x).all() and bool((law.log_prob(x) > -math.inf).all())
    assert LETTERS.vocabulary.decode(x) == ["ab", "ab"]


def test_a_graph_allows_its_walks():
    lm = table_lm(V, T)
    automaton = each_a_before_b(lm)
    expected = [satisfied(row) for row in ROWS]
    assert automaton.holds(X).tolist() == expected and any(expected)
    assert automaton([list(row) for row in ROWS]) == expected  # ragged, and pad is an end token
    assert automaton.holds(X.reshape(11, 11, 1, T)).shape == (11, 11, 1)
    assert automaton.shortest == 3


def test_a_token_that_leads_to_two_nodes():
    """a* b or a c: after the first a one cannot know."""
    graph = networkx.DiGraph()
    graph.add_edge(0, 1, token="a")
    graph.add_edge(1, 1, token="a")
    graph.add_edge(1, 9, token="b")
    graph.add_edge(0, 2, token="a")
    graph.add_edge(2, 9, token="c")
    automaton = Automaton.graph(graph, 0, [9], table_lm(V, T).vocabulary)
    texts = {"".join("abc"[i] for i in row[:-1]) for row in ROWS if automaton([list(row)]) == [1.0]}
    assert texts == {"ab", "aab", "ac"}


def test_every_end_token_ends_and_a_truncated_text_never_satisfies():
    lm = tiny.table(4, 3, ends=[1, 3], pad=1)
    graph = networkx.DiGraph()
    graph.add_edge(0, 0, token=[0, 2])
    automaton = Automaton.graph(graph, 0, [0], lm.vocabulary)
    assert automaton([[0, 2, 1], [3], [2, 3], [0, 2, 0], [1]]) == [1, 1, 1, 0, 1]
    law = product([lm, automaton.mask(lm)])(["a"])
    x = lm(["a"]).enumerate_support()[:, 0]
    assert torch.equal(law.log_prob(x[:, None])[:, 0] > -math.inf, lm.vocabulary.is_end(x).any(-1))


# The mask


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_the_mask_lets_begin_what_can_be_finished(steps):
    """Every prefix that it allows, by brute force over all outcomes; and at the last token the ends alone."""
    lm = table_lm(V, steps)
    rows = oracle.outcomes(V, steps, END)
    begun = {row[:n] for row in filter(satisfied, rows) for n in range(1, len(row) + 1)}
    mask = each_a_before_b(lm).mask(lm)
    assert stuck(mask, rows, begun) == []


def stuck(mask: LanguageModel, rows, begun) -> list[tuple[int, ...]]:
    """Prefixes of which the mask thinks otherwise than brute force does."""
    wrong = []
    todo = [()]
    while todo:
        head = todo.pop()
        x = torch.tensor([[*head, END] + [END] * (mask.max_new_tokens - len(head) - 1)])
        allowed = mask.next_token_logits(mask.prompts([""]), x)[0, len(head)] == 0
        for token in range(V):
            grown = (*head, token)
            wrong += [grown] if bool(allowed[token]) != (grown in begun) else []
            if allowed[token] and token != END and len(grown) < mask.max_new_tokens:
                todo.append(grown)
    return wrong


def test_a_mask_that_does_not_prune_gets_stuck(monkeypatch):
    """The mutant: only what breaks the automaton at once is left out."""
    made = TokenMask.__init__

    def blind(self, to, needs, max_new_tokens):
        made(self, to, torch.where((needs > 0) & (needs < 2**15 - 1), 0, needs), max_new_tokens)

    monkeypatch.setattr(TokenMask, "__init__", blind)
    lm = table_lm(V, T)
    begun = {row[:n] for row in filter(satisfied, ROWS) for n in range(1, len(row) + 1)}
    assert (0, 0, 0, 0) in stuck(each_a_before_b(lm).mask(lm), ROWS, begun)


def test_states_that_lead_nowhere_are_gone():
    lm = table_lm(V, T)
    automaton = each_a_before_b(lm)
    assert automaton.to.shape == (4, V)  # start, a, b and none of them; "lost" is not one


# Local masking


@pytest.mark.parametrize("seed", [0, 1])
def test_local_masking_is_a_law_and_its_weights_make_it_the_posterior(seed):
    lm = table_lm(V, T, max_prompt=2, concentration=0.5, seed=seed)
    automaton = each_a_before_b(lm)
    masked = product([lm, automaton.mask(lm)])
    model, guide = bind(constrained, lm, constraint=automaton), bind(finetuned, masked)
    truth = enumerate_posterior(model, guide, ["", "b a"])  # left-padded: prompts of one and two tokens
    allowed = [row for row in ROWS if satisfied(row)]
    for b, text in enumerate(["", "b a"]):
        context = tuple(lm.vocabulary.encode(text))
        log_p0 = oracle.log_probs(lm.model.table, context, ROWS)
        holds = torch.tensor([satisfied(row) for row in ROWS])
        log_q = law_by_hand(lm.model.table, context, allowed)
        order = [ROWS.index(tuple(row)) for row in lm.vocabulary.completion_ids(truth.latents["x"][:, b])]
        close = {"atol": 1e-10, "rtol": 0}
        torch.testing.assert_close(truth.log_q[:, b], log_q[order], **close)
        torch.testing.assert_close(log_q.logsumexp(0), torch.zeros((), dtype=torch.float64), **close)
        log_w = torch.where(truth.log_q[:, b] == -math.inf, -math.inf, truth.log_joint[:, b] - truth.log_q[:, b])
        log_z = log_p0[holds].logsumexp(0)
        weighted = truth.log_q[:, b] + log_w
        weighted = torch.where(log_w == -math.inf, -math.inf, weighted)
        torch.testing.assert_close(weighted.logsumexp(0), log_z, **close)
        posterior = torch.where(holds, log_p0 - log_z, -math.inf)[order]
        torch.testing.assert_close((weighted - log_z).exp(), posterior.exp(), **close)
        assert tv(truth.log_q[:, b], posterior) > 0.05  # the mutant: no weights


def test_what_it_draws_is_weighted_as_enumerated():
    lm = table_lm(V, T, concentration=0.5)
    automaton = each_a_before_b(lm)
    model = bind(constrained, lm, constraint=automaton)
    guide = bind(finetuned, product([lm, automaton.mask(lm)]))
    draws = importance(model, guide, [""], num_samples=2000)
    assert bool((draws.records["holds"] == 1).all())
    found = log_evidence(draws)
    assert abs(float(found.log_z - enumerate_posterior(model, None, [""]).log_z)) < 4 * float(found.log_z_se)


def test_reverse_kl_of_a_masked_guide_is_finite():
    """A guide that never breaks the constraint is told from one that does by its weights alone."""
    lm = table_lm(V, T, concentration=0.5)
    automaton = each_a_before_b(lm)
    truth = enumerate_posterior(
        bind(constrained, lm, constraint=automaton), bind(finetuned, product([lm, automaton.mask(lm)])), [""]
    )
    assert 0 < float(truth.kl_q_p) < math.inf and 0 < float(truth.kl_p_q) < math.inf


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_drawn_is_scored_and_cached_is_uncached(kind):
    lm = tiny.language_model(kind).double()
    automaton = Automaton.regex("[a-m ]+(é|[.]{2})?", lm.vocabulary)
    masked = product([lm, automaton.mask(lm)])
    assert masked.self_check() < 1e-10
    law = masked(TEXTS)
    x = law.sample((20,))
    assert bool(automaton.holds(x).all())
    torch.testing.assert_close(law.sampled_log_probs(x), law.token_log_probs(x), atol=1e-10, rtol=0)
    alone = torch.stack([masked([text]).log_prob(x[:, b : b + 1])[:, 0] for b, text in enumerate(TEXTS)], 1)
    torch.testing.assert_close(law.log_prob(x), alone, atol=1e-10, rtol=0)
    start = torch.ones(x.shape[:-1], dtype=torch.int64).clamp_max(lm.vocabulary.lengths(x) - 1)
    again = law.resume(x, start)
    assert bool(automaton.holds(again).all()) and torch.equal(again[..., 0], x[..., 0])


def test_the_states_move_with_the_rows():
    """Catches a cache that stays where it was when rows are copied, moved or dropped."""
    lm = table_lm(V, 6, max_prompt=2)
    decoder = Decoder.of(each_a_before_b(lm).mask(lm), lm.prompts(["", "b a"]), torch.tensor([1, 0, 0]))
    texts: list[list[int]] = [[], [], []]
    for tokens, rows in (([0, 0, 0], [2, 1, 0, 0]), ([1, 2, 0, 1], [3, 1, 1, 0, 2]), ([0, 1, 2, 0, 1], [4, 0, 1])):
        decoder.advance(torch.tensor(tokens))
        decoder.reorder(torch.tensor(rows))
        texts = [[*texts[row], tokens[row]] for row in rows]
    rows = [row for row in oracle.outcomes(V, 6, END) if satisfied(row)]
    for text, logits in zip(texts, decoder.logits(), strict=True):
        begun = {row[: len(text) + 1] for row in rows}
        assert [(*text, v) in begun for v in range(V)] == (logits == 0).tolist()


def test_the_mask_costs_nothing():
    lm = tiny.language_model("llama")
    mask = Automaton.regex("[a-z ]*", lm.vocabulary).mask(lm)
    masked = product([lm, mask])
    with measure() as alone:
        lm(TEXTS).log_prob(lm(TEXTS).sample())
    with measure() as cost:
        mask(TEXTS).sample()
    assert cost.lm_tokens == 0 < alone.lm_tokens and masked.networks == 1


# Characters of several bytes


def test_characters_split_between_tokens():
    lm = tiny.language_model("gpt2", max_new_tokens=12)
    pattern = "(é|🙂)[aé]?"
    automaton = Automaton.regex(pattern, lm.vocabulary)
    for text in ("é", "éa", "🙂é", "🙂"):
        ids = lm.vocabulary.plain(text)
        assert len(ids) > len(text) and automaton([[*ids, 2], [*ids[1:], 2], ids]) == [1, 0, 0], text
    x = product([lm, automaton.mask(lm)])([""]).sample((200,))
    found = set(lm.vocabulary.decode(x[:, 0]))
    assert len(found) > 3 and all(re.fullmatch(pattern, text) for text in found)


def sentencepiece_vocabulary() -> Vocabulary:
    pieces = ["<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "▁a", "▁", "é", "b▁"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return Vocabulary(tokenizer, len(pieces), [2], 0, 1)


def test_bytes_of_tokens():
    made = token_bytes(sentencepiece_vocabulary())
    assert made == {
        **{3 + b: bytes([b]) for b in range(256)},
        259: b"a",
        260: b" a",
        261: b" ",
        262: "é".encode(),
        263: b"b ",
    }
    lm = tiny.language_model("gpt2")
    made = token_bytes(lm.vocabulary)
    assert sorted(made) == list(range(5, 300))
    for text in (" naïve ☕\n🙂", "the soup was good"):
        assert b"".join(made[i] for i in lm.vocabulary.plain(text)) == text.encode()


def test_bytes_of_gpt2():
    folder = DATA / "gpt2_tokenizer"
    if not folder.is_dir():
        pytest.skip("needs GPT-2's tokenizer, which is not part of the project")
    backend = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    made = token_bytes(Vocabulary(tokenizer, 50304, [50256], 50256, None))  # rows that pad the embedding have no token
    assert len(made) == 50256 and made[262] == b" the" and made[8582] == b"\xf0\x9f"


# Real language models


def agrees(lm: LanguageModel, prompt: str, pattern: str, draws: int) -> None:
    automaton = Automaton.regex(pattern, lm.vocabulary)
    model = bind(constrained, lm, constraint=automaton)
    guide = bind(finetuned, product([lm, automaton.mask(lm)]))
    masked = importance(model, guide, [prompt], num_samples=draws)
    assert bool((masked.records["holds"] == 1).all())
    assert all(re.fullmatch(pattern, text) for text in masked.text()[0])
    plain = importance(model, None, [prompt], num_samples=8 * draws)
    (one, error), (two, plain_error) = ((float(e.log_z), float(e.log_z_se)) for e in map(log_evidence, (masked, plain)))
    print(f"log Z masked {one:.3f} ± {error:.3f}, prior {two:.3f} ± {plain_error:.3f}")
    assert plain_error < 0.3 and abs(one - two) < 4 * math.hypot(error, plain_error)


def test_the_embedded_lm_keeps_to_a_pattern():
    agrees(
        LanguageModel.from_pretrained(max_new_tokens=24), "The soup was", r" (good|bad|great|lovely)[a-z ,]*\..*", 500
    )


@pytest.mark.slow
def test_stories_keep_to_a_pattern(stories):
    lm = LanguageModel.from_pretrained(stories, max_new_tokens=24)
    agrees(lm, "Tom was happy. They played together all day. The end", r"\.( The [a-z]+\.)?", 500)


# Refusals


def test_refusals_of_patterns():
    vocabulary = LETTERS.vocabulary
    for pattern, message in {
        "": "pattern is empty",
        "(a": "cannot be made an automaton",
        "a)|(b": "cannot be made an automaton",
        "^a": "leave anchors out",
        "a$": "leave anchors out",
        "z+": "no text satisfies it",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            Automaton.regex(pattern, vocabulary)
    assert Automaton.regex("a|bz", vocabulary).shortest == 2  # a part that no token writes
    with pytest.raises(ValueError, match=r"5 tokens, its end token included, but max_new_tokens=4"):
        Automaton.regex("(ab){4}", vocabulary).mask(LETTERS)
    with pytest.raises(ValueError, match="not its tokens' bytes"):
        Automaton.regex("a", table_lm(V, T).vocabulary)  # it writes spaces between its tokens


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(ImportError, match=re.escape("ppl_lm[grammar]")):
        Automaton.regex("a", LETTERS.vocabulary)


def test_refusals_of_graphs_and_masks():
    lm = table_lm(V, T)
    graph = networkx.DiGraph()
    graph.add_edge("start", "end", token=0)
    graph.add_edge("away", "end", token=0)
    build = lambda start="start", ends=("end",), attribute="token": Automaton.graph(  # noqa: E731
        graph, start, ends, lm.vocabulary, attribute
    )
    for settings_, message in (
        ({"start": "nowhere"}, "'nowhere' is none of the graph's 3 nodes"),
        ({"ends": ["nowhere"]}, "'nowhere' is none of the graph's 3 nodes"),
        ({"ends": ["away"]}, "no text satisfies it"),
        ({"attribute": "letter"}, "no attribute 'letter'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**settings_)
    for token, message in (
        (9, "token 9"),
        (END, f"token {END}"),
        ("a b", "is 2 tokens"),
        (0.5, "an edge's token is 0.5"),
    ):
        graph.edges["start", "end"]["token"] = token
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(ValueError, match="'b' is none of the automaton's 1 states"):
        Automaton({"a": {}}, "a", ["b"], lm.vocabulary)
    with pytest.raises(ValueError, match="the shortest text .* has 3 tokens, .* max_new_tokens=2"):
        each_a_before_b(lm).mask(table_lm(V, 2))
    with pytest.raises(ValueError, match="different tokenizers"):
        each_a_before_b(lm).mask(table_lm(5, T))


def test_a_prior_that_gives_nothing_that_is_allowed_is_told():
    lm = table_lm(V, T)
    with torch.no_grad():
        lm.model.table[:, 1] = -math.inf  # never a b
    automaton = each_a_before_b(lm)
    masked = product([lm, automaton.mask(lm)])
    with pytest.raises(DivergedError, match="no next token to give"):
        masked([""]).sample((50,))
    with pytest.raises(DivergedError, match="no next token to give"):
        masked([""]).log_prob(torch.tensor([[0, 0, 1, END]]))


def test_a_masked_guide_can_be_trained():
    """It starts within the constraint and stays there."""
    lm = table_lm(V, T, concentration=0.5)
    automaton = each_a_before_b(lm)
    model = bind(constrained, lm, constraint=automaton)
    guide = bind(finetuned, product([lm, automaton.mask(lm)]).copy())
    loss = SequenceELBO(64, objective=forward_kl).differentiable_loss(model, guide, [""])
    loss.backward()
    gradients = [p.grad for p in guide.parameters() if p.grad is not None]
    assert (
        gradients and all(bool(g.isfinite().all()) for g in gradients) and any(bool((g != 0).any()) for g in gradients)
    )
