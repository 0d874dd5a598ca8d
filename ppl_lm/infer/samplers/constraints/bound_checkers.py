"""Whether a checker may be asked in the place of a model's evidence: what it rules out must be impossible there."""

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ppl_lm.infer.binding import Bound
from ppl_lm.infer.traces.observations import log_likelihood_of_text
from ppl_lm.likelihood.checker import Checker
from ppl_lm.lm import meter
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.token_sequence import TokenSequence

TEXTS = 64  # that are looked at


def checkers_of(model: Any) -> list[Checker]:
    """Among the arguments of a bound model, also in lists, tuples and dictionaries; none of a plain function."""
    return _among(model.arguments) if isinstance(model, Bound) else []


def prompts_of(given: Any, law: TokenSequence) -> Prompts:
    """The prompts that a program was given, as such, whatever it makes of them before it draws its text."""
    if isinstance(given, Prompts):
        return given
    return Prompts.make(given, law.lm.vocabulary, law.prompts.ids.device)


@torch.no_grad()
def require_evidence(model: Any, prompts: Prompts, law: TokenSequence, checker: Checker) -> None:
    """Looks at texts of the prior, which count as no cost: those that the checker does not allow must be impossible under the
    model, and what begins as it says that nothing allowed does must not be allowed when it is written to its end.

    :raises ValueError: if one is."""
    with meter.unmeasured(), law.lm.precision():
        count = math.ceil(TEXTS / len(law.prompts))
        rows = torch.arange(len(law.prompts), device=law.prompts.ids.device).repeat(count)
        x = law.sample((count,)).reshape(len(rows), -1)
        lengths = law.lm.vocabulary.lengths(x)
        dead = torch.zeros_like(lengths)  # tokens of the shortest beginning that it rules out
        for n in range(1, x.shape[1]):
            open_ = (dead == 0) & (n < lengths)
            if bool(open_.any()):
                at = open_.nonzero()[:, 0]
                fine = checker.allows(law.prompts.take(rows[at]), x[at], torch.full_like(at, n))
                dead[at[~fine]] = n
        require_dead(model, prompts, law, checker, x, dead, rows)


@torch.no_grad()
def require_dead(
    model: Any,
    prompts: Prompts,
    law: TokenSequence,
    checker: Checker,
    x: Int[Tensor, "N T"],
    dead: Int[Tensor, "N"],
    rows: Int[Tensor, "N"],
) -> None:
    """:param x: whole texts, or as far as they came before they were ruled out.
    :param dead: after how many tokens the checker has ruled each text out; 0: not before its end.
    :param rows: the prompt of each.
    :raises ValueError: if one is allowed as a whole, or when it is written to its end, or the model finds it possible."""
    with meter.unmeasured():
        vocabulary, begun = law.lm.vocabulary, (dead > 0) & (dead < x.shape[1])
        begun = begun & ~vocabulary.is_end(x.gather(-1, (dead - 1).clamp_min(0).unsqueeze(-1))[:, 0])
        at, whole = begun.nonzero()[:, 0], (~begun).nonzero()[:, 0]
        versions = [(x[whole], rows[whole], dead[whole])]
        if len(at):
            versions.append((law.slice(rows[at]).resume(x[at], dead[at]), rows[at], dead[at]))
        for texts, of, ruled_out in (version for version in versions if len(version[0])):
            allowed = checker.allows(law.prompts.take(of), texts, vocabulary.lengths(texts))
            _refuse(
                allowed & (ruled_out > 0), "ruled out the beginning of a text that it allows", checker, law, texts, of
            )
            out = (~allowed).nonzero()[:, 0]
            if len(out):
                possible = log_likelihood_of_text(model, prompts.take(of[out]), texts[out]) > -math.inf
                _refuse(possible, "rules out a text that the model finds possible", checker, law, texts[out], of[out])


def _refuse(wrong: Tensor, what: str, checker: Checker, law: TokenSequence, x: Tensor, rows: Tensor) -> None:
    if not bool(wrong.any()):
        return
    i = wrong.nonzero()[:1, 0]
    (text,) = law.prompts.take(rows[i]).decode(x[i])
    raise ValueError(
        f"checker {checker.name!r} {what}: {text[:80]!r}. Of a text begun it may say False only where nothing that begins so "
        "is allowed, and the model must have it as evidence: bind(constrained, prior, constraint=checker)"
    )


def _among(value: Any) -> list[Checker]:
    if isinstance(value, Checker):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [found for item in items for found in _among(item)]
