"""`samples`: texts of the prior, the guide and the posterior side by side, token by token, as plain data."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NotRequired, TypedDict

from ppl_lm.criticism.averages import over_prompts
from ppl_lm.criticism.diagnoses.diagnosis import Diagnosis
from ppl_lm.criticism.diagnoses.pool import pooled
from ppl_lm.criticism.gains import token_gains
from ppl_lm.criticism.text_diversity import diversity
from ppl_lm.infer.draws import Draws, NoSupportError
from ppl_lm.lm.tokens.token_pieces import pieces

COUNT, MOST = 8, 8  # texts of each law that are shown, and prompts
TEXTS, VARIED = 500, 4  # texts of each law whose variety is measured, and prompts


class ShownText(TypedDict):
    """A text: what each token adds to it, and log q - log p0 of each token, nats; see `samples`.

    `recorded`: what the model recorded of it besides the reward, by name; None of what is infinite."""

    tokens: list[str]
    gains: list[float] | None
    reward: float | None
    recorded: NotRequired[dict[str, float | None]]
    log_weight: NotRequired[float | None]


class ShownTexts(TypedDict):
    """Texts after one prompt by three laws; `exact`: whether the posterior's are exact draws. A line of `samples.json`."""

    prompt: Any
    exact: bool
    prior: list[ShownText]
    guide: list[ShownText]
    posterior: list[ShownText]


def samples(
    diagnosis: Diagnosis,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    max_plate_nesting: int | None = None,
    count: int = COUNT,
    most: int = MOST,
) -> list[ShownTexts]:
    """Of each of the first `most` prompts the first `count` texts under `prior`, `guide` and `posterior`.

    A text has `tokens`, what each adds to it; `gains`, log q - log p0 of each token in nats, None where a draw holds several
    texts; `reward`, None where the model records none; `recorded`, what else it records, if anything; and if it is the guide's
    its `log_weight`, nats, None where it is -inf.
    The posterior's are exact draws (`exact` is True), or else resampled by their weights; there are none where no draw is
    possible."""
    by_prompt: list[ShownTexts] = []
    for b, figures in list(enumerate(diagnosis.prompts))[:most]:
        texts = {
            name: [] if draws is None else _texts(draws, model, guide, name == "guide", max_plate_nesting)
            for name, draws in laws(diagnosis, b, count).items()
        }
        exact = diagnosis.exact[b] is not None
        by_prompt.append(ShownTexts(prompt=figures.prompt, exact=exact, **texts))
    return by_prompt


def variety(diagnosis: Diagnosis, seed: int = 0) -> dict[str, dict[str, Any] | None]:
    """`diversity` of `prior`, `guide` and `posterior`, each of the same number of texts, since shares of n-grams fall with it:
    500 of each of the first 4 prompts, or as many as there are exact draws of all of these. None of a law without draws."""
    few = range(min(VARIED, len(diagnosis.prompts)))
    exact = [draws.num_samples for b in few if (draws := diagnosis.exact[b]) is not None]
    count = min([TEXTS, diagnosis.guide.num_samples, *exact])
    parts = [laws(diagnosis, b, count) for b in few]
    return {name: _together([part[name] for part in parts], seed) for name in parts[0]}


def laws(diagnosis: Diagnosis, b: int, count: int) -> dict[str, Draws | None]:
    """`count` draws of prompt b by `prior`, `guide` and `posterior`: exact ones as far as there are, or else draws of the
    prior and of the guide together, resampled by their weights; None where none is possible."""
    prior, guide, exact = diagnosis.prior.of_prompt(b), diagnosis.guide.of_prompt(b), diagnosis.exact[b]
    by_law = {"prior": prior, "guide": guide, "posterior": exact or _resampled(pooled(prior, guide), count)}
    return {name: None if draws is None else draws.map(lambda v: v[:, :count]) for name, draws in by_law.items()}


def some(draws: Draws, count: int) -> Draws:
    """So many of each prompt, of all chains alike, as one chain: of Markov chains the newest, else the first."""
    last = draws.map(lambda v: v.transpose(0, 1).flatten(0, 1).unsqueeze(0))
    return last.map(lambda v: v[:, -count:] if draws.kind == "chains" else v[:, :count])


def recorded(draws: Draws, s: int, b: int) -> dict[str, float | None]:
    """What the model recorded of draw s of prompt b besides its reward, by name, means over inner plates."""
    values = {
        name: value[0, s, min(b, value.shape[2] - 1)] for name, value in draws.records.items() if name != "reward"
    }
    numbers = {name: float(value.double().mean()) for name, value in values.items()}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _together(parts: list[Draws | None], seed: int) -> dict[str, Any] | None:
    by_prompt = [diversity(draws, seed=seed) for draws in parts if draws is not None]
    if not by_prompt:
        return None
    return over_prompts(by_prompt, shared=("num_samples",), without=("prompts",))


def _resampled(draws: Draws, count: int) -> Draws | None:
    """As exact draws: their weights are used up."""
    try:
        picks = draws.reweighted(count)[:, 0]
    except NoSupportError:
        return None
    return replace(draws.map(lambda v: v.flatten(0, 1)[picks].unsqueeze(0)), kind="exact")


def _texts(draws: Draws, model: Any, guide: Any, weighted: bool, nesting: int | None) -> list[ShownText]:
    name = draws.text_site
    one = draws[name].dim() == 4  # text a prompt
    gains = token_gains(model, guide, draws, name, nesting)[0, :, 0] if one else None  # (S, T)
    x = draws[name][0, :, 0]  # (S, *inner, T)
    x = x if one else x.flatten(1, -2)[:, 0]  # of several texts the first
    reward = draws.records.get("reward")
    rows = []
    for s, row in enumerate(x):
        tokens = pieces(draws.prompts.vocabulary, row.cpu(), draws.prompts.contexts[0])
        text: ShownText = {"tokens": tokens, "gains": None, "reward": None}
        if gains is not None:
            text["gains"] = gains[s, : len(tokens)].tolist()
        if others := recorded(draws, s, 0):
            text["recorded"] = others
        if reward is not None:
            text["reward"] = float(reward[0, s, 0].double().mean())
        if weighted:
            log_w = float(draws.log_weight[0, s, 0])
            text["log_weight"] = log_w if math.isfinite(log_w) else None
        rows.append(text)
    return rows
