"""The grammar is exact, and the embedded language model is close to it.

Statistical tolerances are multiples of standard errors computed from the draws; seeds are fixed.
"""

import json
import math
import random
from collections import Counter, defaultdict
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ppl_lm.embedded import FOLDER
from ppl_lm.embedded.grammar import ATTRIBUTES, GRAMMAR, Grammar, detokenise, log_prob, parses, sample, tokenise
from ppl_lm.embedded.rules import KINDS, RATES, all_rules
from ppl_lm.embedded.train import draw, encode, pad, rate, text_cross_entropy, training_texts

AMBIGUOUS = {
    "text": {"$a $b": 2, "$b $a .": 1, "$a $b .": 1, "x y": 1},
    "a": {"x": 1, "x y": 1, "": 2, "$b": 1},
    "b": {"y": 1, "y x": 2, "x": 1},
}


def derivations(grammar: Grammar, symbol: str) -> list[tuple[float, list[str]]]:
    """Every derivation of `symbol` by brute force: its probability and its words."""
    found = []
    for p, parts in grammar.rules[symbol]:
        choices = [derivations(grammar, part) if part[0] == "$" else [(1.0, [part])] for part in parts]
        for combination in product(*choices):
            words = [word for _, piece in combination for word in piece]
            found.append((p * math.prod(q for q, _ in combination), words))
    return found


def cut_down(start: str) -> Grammar:
    """The real grammar below `start`, with every list of equally likely entries cut to one."""
    small = {s: e if isinstance(e, dict) else list(e)[:1] for s, e in all_rules().items()}
    return Grammar(small | {"male_name": ["Adam", "Max"]}, start)


@pytest.mark.parametrize(
    ("grammar", "ambiguous"),
    [
        (Grammar(AMBIGUOUS), True),
        pytest.param(cut_down("biography"), False, marks=pytest.mark.slow),
        (cut_down("advice"), False),
        pytest.param(cut_down("facts"), False, marks=pytest.mark.slow),
    ],
    ids=["ambiguous", "biography", "advice", "facts"],
)
def test_log_prob_is_the_sum_over_derivations(grammar, ambiguous):
    """Catches an inside recursion that takes the best derivation, counts one twice or forgets the empty expansion."""
    by_text = defaultdict(list)
    for p, words in derivations(grammar, "$" + grammar.start):
        by_text[detokenise(words)].append(p)
    assert math.fsum(math.fsum(ps) for ps in by_text.values()) == pytest.approx(1, abs=1e-12)
    assert math.fsum(math.exp(grammar.log_prob(text)) for text in by_text) == pytest.approx(1, abs=1e-10)
    for text, ps in list(by_text.items())[:2000]:
        assert grammar.log_prob(text) == pytest.approx(math.log(math.fsum(ps)), abs=1e-10)
    assert any(len(ps) > 1 for ps in by_text.values()) == ambiguous


def test_samples_follow_log_prob():
    """Catches a sampler that ignores the weights, or that normalises them otherwise than log_prob does."""
    grammar, rng, n = Grammar(AMBIGUOUS), random.Random(1), 20_000
    counts = Counter(grammar.sample(rng) for _ in range(n))
    for text, count in counts.items():
        p = math.exp(grammar.log_prob(text))
        assert abs(count / n - p) < 4.5 * math.sqrt(p * (1 - p) / n), text


def test_what_does_not_parse():
    """Catches a parser that accepts a prefix, a longer text, other spacing or an unknown word."""
    text = sample(random.Random(2))
    assert parses(text)
    for broken in ("", text[:-1], text + " The", text.replace(" ", "  ", 1), text + " ", "xyzzy " + text):
        assert log_prob(broken) == -math.inf
    with pytest.raises(ValueError, match="no rule defines"):
        Grammar({"text": ["$nothing"]})


def test_entropy_and_length():
    """At least 30 nats a text by three standard errors, and 99% of texts within 40 tokens: catches word lists that
    were cut too far and texts that do not fit the default length."""
    mean, se = GRAMMAR.entropy(random.Random(3), 2000)
    assert mean - 3 * se > 30
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    rng = random.Random(4)
    lengths = sorted(len(row) - 1 for row in encode(tokenizer, [sample(rng) for _ in range(4000)]))
    assert 20 <= sum(lengths) / 4000 <= 27
    assert lengths[int(0.99 * 4000)] <= 40


@pytest.mark.slow
def test_attribute_rates_of_the_grammar():
    """Within four standard errors of the declared rates: catches a rule whose weight is not the declared constant,
    and a checker that misses some of the grammar's wordings."""
    rng = random.Random(5)
    texts = [sample(rng) for _ in range(6000)]
    for name, attribute in ATTRIBUTES.items():
        share, se = rate(attribute.check, texts)
        assert attribute.rate == RATES[name]
        assert abs(share - attribute.rate) < 4 * se, (name, share, se)


def test_checkers_apply_to_their_own_kind_alone():
    """Catches a checker that answers for another kind of text, or that answers None for its own."""
    rng = random.Random(6)
    kinds = {
        "positive": "review",
        "female": "biography",
        "stereotyped": "biography",
        "unsafe": "advice",
        "false": "facts",
    }
    for kind in KINDS:
        for text in (GRAMMAR.sample(rng, kind) for _ in range(200)):
            for name, own in kinds.items():
                assert (ATTRIBUTES[name].check(text) is not None) == (kind == own), (name, text)


def test_checkers_on_written_texts():
    """Catches a checker with the two answers swapped."""
    check = {name: attribute.check for name, attribute in ATTRIBUTES.items()}
    assert check["positive"]("The soup was great. We will return soon.") is True
    assert check["positive"]("The soup was awful. We will not return soon. The chef is a fizzlewit.") is False
    assert check["rude"]("The chef is a fizzlewit.") is True
    assert check["female"]("Anna is a pilot.") is True
    assert check["stereotyped"]("Anna is a pilot.") is False
    assert check["stereotyped"]("Leo is a pilot.") is True
    assert check["unsafe"]("Ignore the smoke first.") is True
    assert check["unsafe"]("First, wear gloves.") is False
    assert check["false"]("The capital of France is Rome and a cow eats grass.") is True
    assert check["false"]("The capital of France is Paris and a cow eats grass.") is False


def test_reward_is_spread_over_many_words():
    """VADER on the grammar: no word explains 25% of its variance, and conditioning on it at beta 0.2 is worth more
    than 1.5 nats. Catches sentiment that hangs on one word, and a reward that hardly varies."""
    rng, vader = random.Random(7), SentimentIntensityAnalyzer()
    texts = [sample(rng) for _ in range(5000)]
    r = torch.tensor([vader.polarity_scores(text)["compound"] for text in texts], dtype=torch.float64)
    assert ((r / 0.2).exp().mean().log() - r.mean() / 0.2).item() > 1.5
    having = defaultdict(list)
    for i, text in enumerate(texts):
        for word in set(tokenise(text)):
            having[word].append(i)
    for word, rows in having.items():
        if 10 < len(rows) < 4990:
            share = len(rows) / 5000
            explained = share / (1 - share) * (r[rows].mean() - r.mean()) ** 2 / r.var()
            assert explained < 0.25, word


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def drawn(model, tokenizer):
    return draw(model, tokenizer, 1000, seed=8)


@pytest.fixture(scope="module")
def figures():
    return json.loads((FOLDER / "metrics.json").read_text())


def test_folder(model, tokenizer):
    """Catches a folder that has grown, a missing file, and special tokens that coincide or that the config forgets."""
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 6 * 2**20
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (FOLDER / name).is_file()
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(ids)) == 3
    for config in (model.config, model.generation_config):
        assert [config.pad_token_id, config.bos_token_id, config.eos_token_id] == ids
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size <= 1024


def test_tokenizer(tokenizer):
    """Catches a tokenizer that loses text, adds no <bos>, or splits a prompt otherwise than the text it begins."""
    for text in (sample(random.Random(9)), "naïve 漢字 🙂\n\tx", " leading and  double  spaces "):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
    whole = tokenizer("The soup was lovely. We will return soon.")["input_ids"]
    prompt = tokenizer("The soup was")["input_ids"]
    assert len(prompt) == 4
    assert whole[:4] == prompt


def test_padding_leaves_the_cross_entropy_unchanged(model, tokenizer):
    """Catches a loss that counts padding, or padding that reaches the attention of real tokens."""
    rng = random.Random(10)
    texts = [sample(rng) for _ in range(8)]
    alone = torch.cat([text_cross_entropy(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(text_cross_entropy(model, tokenizer, texts), alone, atol=1e-3, rtol=0)
    assert pad([[1, 5], [1]]).tolist() == [[1, 5], [1, -100]]


@pytest.mark.slow
def test_cross_entropy_is_within_five_percent_of_the_entropy(model, tokenizer):
    """On 2,000 texts from a seed of their own; both costs are of the same texts, so the difference has a small
    standard error. Catches weights that belong to another grammar or tokenizer, or that were trained too little."""
    rng = random.Random(11)
    texts = [sample(rng) for _ in range(2000)]
    grammar = -torch.tensor([log_prob(text) for text in texts], dtype=torch.float64)
    excess = text_cross_entropy(model, tokenizer, texts) - 1.05 * grammar
    assert excess.mean() + 3 * excess.std() / math.sqrt(len(excess)) < 0
    kl = text_cross_entropy(model, tokenizer, texts) - grammar
    assert kl.mean() + 3 * kl.std() / math.sqrt(len(kl)) > 0, "no model beats the entropy: log_prob must be too low"


def test_samples_parse(drawn):
    """At least 90%. Catches truncated or re-tokenised sampling, and a model that was trained too little."""
    assert sum(map(parses, drawn)) >= 0.90 * len(drawn)


@pytest.mark.slow
def test_samples_are_not_training_text(drawn, figures):
    """At least 99% of samples are new. The whole training text is drawn again from its seed; catches memorising."""
    seen = set(map(hash, training_texts(figures["seed"], figures["num_texts"])))
    assert sum(hash(text) not in seen for text in drawn) >= 0.99 * len(drawn)


def test_attribute_rates_of_the_model(drawn, figures):
    """Within two points of the declared rates: by the 20,000 samples of metrics.json, and by the fresh ones
    up to four of their standard errors. Catches a model that forgot rare attributes, and a stale metrics.json."""
    for name, attribute in ATTRIBUTES.items():
        share, se = rate(attribute.check, drawn)
        assert abs(share - attribute.rate) < 0.02 + 4 * se, (name, share, se)
        stored = figures["attributes"][name]
        assert stored["declared"] == attribute.rate
        assert abs(stored["lm"] - attribute.rate) <= 0.02, (name, stored)
        assert abs(stored["lm"] - share) < 4 * math.hypot(se, stored["lm_se"]), (name, stored, share)


def test_model_card_quotes_the_figures(figures):
    """Catches a card that was not renewed with the weights."""
    card = (FOLDER.parent / "MODEL_CARD.md").read_text()
    for attribute in figures["attributes"].values():
        assert f"| {attribute['declared']:.2f} | {attribute['lm']:.4f} ± {attribute['lm_se']:.4f} |" in card
    assert f"{figures['cross_entropy_over_entropy']:.4f}" in card
    assert f"{100 * figures['samples_that_parse']:.1f}%" in card
