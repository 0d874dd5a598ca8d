"""What draws are summarised by: the model's records, lengths, log p of the prior, and a user's statistics of their texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.infer.draws import Draws

Statistic = Callable[[list[str]], Sequence[float]]  # of each text, in any unit


def numbers(draws: Draws) -> dict[str, Tensor]:
    """What draws are summarised by, float64, (C, S, B): the model's records, the lengths of texts, log p of the prior."""
    vocabulary, columns_by_name = draws.prompts.vocabulary, dict(draws.records)
    for name in draws.texts:
        if draws[name].dim() == 4:  # one text a prompt
            columns_by_name[length_name(name)] = vocabulary.lengths(draws[name]).double()
    columns_by_name["log_prior"] = draws.log_prior
    columns = draws.log_guide.shape[-1]
    return {
        k: v.double() if v.shape[-1] == columns else v.double().mean(-1, keepdim=True)
        for k, v in columns_by_name.items()
    }


def scalars(draws: Draws) -> dict[str, Tensor]:
    """Everything of a draw that is a number or an array of numbers, float64, (C, S, B, ...): records, latent sites that are no
    text, lengths of texts, log p of the prior. B is 1 of what all prompts share."""
    known = {k: v.double() for k, v in (*draws.records.items(), *draws.latents.items()) if k not in draws.texts}
    for name in draws.texts:
        known[length_name(name)] = draws.prompts.vocabulary.lengths(draws[name]).double()
    return {**known, "log_prior": draws.log_prior}


def length_name(text: str) -> str:
    return "length" if text == "x" else f"{text}_length"


def recorded(draws: Draws, statistics: Mapping[str, Statistic] | None) -> Draws:
    """The same draws with statistics of their texts among the model's records.

    :raises ValueError: as `evaluate`, and of a name that one of their `numbers` has."""
    taken = sorted({*(statistics or {})} & {*numbers(draws)})
    if taken:
        raise ValueError(f"statistics {taken} have the names of the draws' own numbers; give them other ones")
    return replace(draws, records={**draws.records, **evaluate(draws, statistics)}) if statistics else draws


def evaluate(draws: Draws, statistics: Mapping[str, Statistic], name: str | None = None) -> dict[str, Tensor]:
    """Each statistic of the draws' texts, (C, S, B) float64; it is given the texts of one prompt at a time.

    :param name: of the site that is text; None: `x`, or the first.
    :raises ValueError: if no site of this name is text, a draw has several for a prompt, or a statistic is not one finite
        number a text."""
    name = name or draws.text_site
    if name not in draws.texts:
        raise ValueError(f"no site {name!r} is text; those that are: {list(draws.texts)}")
    x = draws[name]
    if x.dim() != 4:
        raise ValueError(f"{name!r} has the shape {tuple(x.shape)}; one text a draw and prompt is needed: (C, S, B, T)")
    texts = draws.text(name)
    return {
        key: torch.stack([values(key, function, each) for each in texts], -1).reshape(x.shape[:3]).to(x.device)
        for key, function in statistics.items()
    }


def values(key: str, function: Statistic, texts: list[str]) -> Float[Tensor, "N"]:
    """One statistic of texts, checked, on the CPU."""
    try:
        answers = torch.as_tensor(function(texts), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"statistic {key!r} failed: {error}; it is given a list of texts, and answers with one number for each"
        ) from error
    if answers.shape != (len(texts),) or not bool(answers.isfinite().all()):
        wrong = "NaN or infinite numbers" if answers.shape == (len(texts),) else f"the shape {tuple(answers.shape)}"
        raise ValueError(f"statistic {key!r} gave {wrong} for {len(texts)} texts; give one finite number a text")
    return answers
