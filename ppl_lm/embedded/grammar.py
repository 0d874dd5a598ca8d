"""The text that the embedded language model is trained on: a weighted context-free grammar.

A text is a review (half of them), a biography, a piece of advice or a statement of facts. Because the grammar is
known, so are the probability of every text, the entropy of the text and the rate of every attribute.

    log p(text) = log Σ_{derivations d of text} Π_{rules in d} p(rule)                                          (nats)

The sum is taken by the inside recursion on (symbol, position) (Baker 1979; Manning & Schütze 1999, §11.3).
"""

import math
import random
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from ppl_lm.embedded.rules import RATES, Rules, all_rules
from ppl_lm.embedded.words import FACTS, LISTS, RUDE


class Grammar:
    """A weighted context-free grammar without recursion, given as data.

    `rules[symbol]` maps expansions to weights, or lists equally likely ones. An expansion is a string of words,
    marks (. , ! ? :) and `$symbol`s with spaces between them; "" is the empty one.
    """

    def __init__(self, rules: Rules, start: str = "text"):
        self.start = start
        self.rules: dict[str, list[tuple[float, list[str]]]] = {}
        for symbol, expansions in rules.items():
            weights = dict(expansions) if isinstance(expansions, Mapping) else dict.fromkeys(expansions, 1.0)
            total = sum(weights.values())
            self.rules["$" + symbol] = [(w / total, expansion.split()) for expansion, w in weights.items() if w > 0]
        missing = {p for rs in self.rules.values() for _, ps in rs for p in ps if p[0] == "$"} - set(self.rules)
        if missing:
            raise ValueError(f"the rules use {sorted(missing)}, which no rule defines")
        self._cumulative = {s: list(accumulate(p for p, _ in rs)) for s, rs in self.rules.items()}
        self._first = cache(self._first)  # symbol -> the words that can start it, "" if it can be empty
        # For each symbol, the rules that can start with a word; those that can be empty are listed under "".
        self._starting: dict[str, dict[str, list[tuple[float, list[str]]]]] = {}
        for symbol, productions in self.rules.items():
            table = self._starting[symbol] = {}
            for production in productions:
                for word in self._first_of(production[1]):
                    table.setdefault(word, []).append(production)

    def _first(self, part: str) -> frozenset[str]:
        if part[0] != "$":
            return frozenset([part])
        return frozenset().union(*(self._first_of(parts) for _, parts in self.rules[part]))

    def _first_of(self, parts: list[str]) -> frozenset[str]:
        words: frozenset[str] = frozenset([""])
        for part in parts:
            words = (words - {""}) | self._first(part)
            if "" not in words:
                break
        return words

    def sample(self, rng: random.Random, start: str | None = None) -> str:
        """Draw one text from `start` (default: the start symbol)."""
        words: list[str] = []
        stack = ["$" + (start or self.start)]
        while stack:
            part = stack.pop()
            if part[0] == "$":
                cumulative = self._cumulative[part]
                stack.extend(reversed(self.rules[part][bisect(cumulative, rng.random() * cumulative[-1])][1]))
            else:
                words.append(part)
        return detokenise(words)

    def log_prob(self, text: str, start: str | None = None) -> float:
        """log of the probability that `start` (default: the start symbol) yields `text`, nats; -inf: it cannot."""
        words = tokenise(text)
        if detokenise(words) != text:
            return -math.inf
        memo: dict[tuple[str, int], dict[int, float]] = {}

        def inside(symbol: str, begin: int) -> dict[int, float]:
            """P(symbol ⇒ words[begin:end]) for every end at which it is positive."""
            ends = memo.get((symbol, begin))
            if ends is None:
                ends = memo[symbol, begin] = {}
                table = self._starting[symbol]
                productions = list(table.get(words[begin], ())) if begin < len(words) else []
                productions += [p for p in table.get("", ()) if p not in productions]
                for p, parts in productions:
                    reached = {begin: p}
                    for part in parts:
                        step: dict[int, float] = {}
                        for position, weight in reached.items():
                            if part[0] == "$":
                                for end, q in inside(part, position).items():
                                    step[end] = step.get(end, 0.0) + weight * q
                            elif position < len(words) and words[position] == part:
                                step[position + 1] = step.get(position + 1, 0.0) + weight
                        reached = step
                        if not reached:
                            break
                    for end, weight in reached.items():
                        ends[end] = ends.get(end, 0.0) + weight
            return ends

        p = inside("$" + (start or self.start), 0).get(len(words), 0.0)
        return math.log(p) if p > 0 else -math.inf

    def entropy(self, rng: random.Random, num_samples: int = 2000) -> tuple[float, float]:
        """Entropy of a text −E[log p(text)] and its standard error, both in nats, from `num_samples` draws."""
        costs = [-self.log_prob(self.sample(rng)) for _ in range(num_samples)]
        mean = sum(costs) / num_samples
        variance = sum((c - mean) ** 2 for c in costs) / (num_samples - 1)
        return mean, math.sqrt(variance / num_samples)


def tokenise(text: str) -> list[str]:
    """Words and marks of a text."""
    return re.findall(r"[.,!?:]|[^\s.,!?:]+", text)


def detokenise(words: Iterable[str]) -> str:
    """The text of words and marks: a space before each word, none before a mark."""
    return re.sub(r" (?=[.,!?:])", "", " ".join(words))


GRAMMAR = Grammar(all_rules())
sample, log_prob, entropy = GRAMMAR.sample, GRAMMAR.log_prob, GRAMMAR.entropy


def parses(text: str) -> bool:
    """Whether the grammar can produce `text`."""
    return log_prob(text) > -math.inf


def is_positive(text: str) -> bool | None:
    """Whether a review praises throughout; None: not a review that parses."""
    whole = re.sub(r"^(Listen|Hey|Move over),( you)? \w+\. ", "", text)
    whole = re.sub(rf" [^.]*\b({'|'.join(RUDE)})\b[^.]*\.$", "", whole)
    if GRAMMAR.log_prob(whole, "review") == -math.inf:
        return None
    return GRAMMAR.log_prob(whole, "review_good") > -math.inf


def is_rude(text: str) -> bool:
    """Whether one of the invented rude words occurs."""
    return not set(tokenise(text)).isdisjoint(RUDE)


def is_female(text: str) -> bool | None:
    """Whether a biography is a woman's, by the first name in it; None: no name."""
    for word in tokenise(text):
        if word in LISTS["female_name"] or word in LISTS["male_name"]:
            return word in LISTS["female_name"]
    return None


def is_stereotyped(text: str) -> bool | None:
    """Whether a biography ties the gender to its usual profession; None: no name or no profession."""
    female = is_female(text)
    for word in tokenise(text):
        for jobs, tied in (("care_job", female), ("tech_job", not female), ("other_job", False)):
            if word in LISTS[jobs]:
                return None if female is None else bool(tied)
    return None


def is_unsafe(text: str) -> bool | None:
    """Whether advice holds an unsafe tip; None: neither a safe nor an unsafe tip in it."""
    text = text.lower()
    if any(tip in text for tip in LISTS["unsafe_tip"]):
        return True
    return False if any(tip in text for tip in LISTS["safe_tip"]) else None


def is_false(text: str) -> bool | None:
    """Whether any fact stated is wrong; None: no fact stated."""
    text = " ".join(tokenise(text.lower()))
    applies = None
    for frame, answers in FACTS.items():
        for key, answer in answers.items():
            subject, _, rest = frame.rpartition("{}")
            found = re.search(rf"\b{subject.format(key)}(\w+){rest}\b".lower(), text)
            if found:
                applies = applies or found[1] != answer.lower()
    return applies


class Attribute(NamedTuple):
    """A yes/no property of texts, and its prior probability among the texts that it applies to."""

    check: Callable[[str], bool | None]  # None: does not apply
    rate: float


ATTRIBUTES = {
    name: Attribute(check, RATES[name])
    for name, check in {
        "positive": is_positive,
        "rude": is_rude,
        "female": is_female,
        "stereotyped": is_stereotyped,
        "unsafe": is_unsafe,
        "false": is_false,
    }.items()
}
