"""`to_arviz`: draws as what ArviZ reads, in either of its two lives."""

import math
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_lm.criticism.effective_size import ess
from ppl_lm.criticism.inference_data.arviz_variables import (
    Variable,
    Variables,
    dataset,
    of_constant,
    of_draws,
    of_observed,
    storable,
    whole,
)
from ppl_lm.criticism.inference_data.resampled_order import arranged
from ppl_lm.criticism.statistics import length_name, scalars
from ppl_lm.infer.draws import EQUAL, TOGETHER, Draws
from ppl_lm.lm.prompt_names import distinct
from ppl_lm.lm.prompts import Prompts

COPIES = 4  # of a draw of average weight: with fewer, rounding their numbers adds to the error of the weights
LOG_PROBABILITIES = ("log_prior", "log_likelihood", "log_guide")


def to_arviz(
    draws: Draws,
    num_samples: int | None = None,
    *,
    prior: Draws | None = None,
    posterior_predictive: Mapping[str, Tensor] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """An `arviz.InferenceData`, or with ArviZ 1 an `xarray.DataTree`. Its groups have the dimensions chain and draw, then
    `prompt` with the prompts' names as coordinates (`.sel(prompt="The soup was")`; see `Prompts.names`), then plates by their
    names, then `SITE_dim_0` and so on of events. What all prompts share has no prompt.

    - `posterior`: equally weighted numbers: the reward and the model's other records, lengths, log p of the prior (nats), and
      latent sites that are no text. Weighted draws are resampled, since ArviZ's summaries know no weights. Copies of a draw
      stand together, so that `ess_bulk` and `mcse_mean` of `az.summary` are what the weights say (`ppl_lm.summary`), a tenth
      or so apart; of few SMC runs only `ppl_lm.summary` knows the errors, and of fewer than three nothing does (`UserWarning`).
    - `completions`: tokens and text of the same draws; `log_prior`: of their latent sites together, nats: what `az.psens`
      scales.
    - `log_likelihood`: of the same draws, log density of each observed site at each index of its plates, nats: what `az.loo`,
      `az.waic` and `az.compare` take.
    - `unnormalised_log_likelihood`: likewise of observed sites that are no normalised density: r/β of an `Optimality`,
      `pyro.factor`, what `poutine.scale` raised to a power. ArviZ must not compare models by it, and finds it in no group
      that it looks for; `compare_models` and `power_scale` take the draws.
    - `guide`: the raw draws with their tokens, numbers, log-probabilities and weights, nats. `az.psislw` takes `log_weight`.
    - `proposals`: log-probabilities of all that a sampler proposed, which discards some, and by which its evidence is known.
    - `sample_stats`: how each raw draw came about, such as the acceptance rates of Markov chains; how each run of SMC did, by
      (chain, prompt, token); and of weighted draws `log_weight`, nats, as in `guide`: `posterior` is resampled by it already.
    - `prior`: where it is given, the prior's draws: numbers and log-probabilities; their tokens and texts are in
      `prior_completions`, how each came about in `sample_stats_prior`. `posterior_predictive`: where it is given, below.
    - `observed_data`: what the model observed, with the same dimensions. `constant_data`: `prompt_text`, and what is given.

    Attributes: versions, the draws' kind and cost, how many of the posterior's draws are different ones of the guide's
    (`unique_fraction`), and what the weighted ones are worth (`weighted_ess`, Kong's).

    :param num_samples: draws in `posterior`; by default as many as were given of exact draws and chains, and four times as many
        of weighted ones: resampling that leaves a draw one copy or none is noise, which would add up to half to the errors.
    :param prior: draws of the model's prior: `importance(model, None, prompts)`.
    :param posterior_predictive: replicates of observed sites for each draw: `predictive(model, draws)`.
    :param constant_data: numbers, texts, or arrays, such as {"beta": 0.2}.
    :param attributes: more of them, such as {"seed": 0}.
    """
    import arviz as az
    import xarray as xr

    datasets = _datasets(draws, num_samples, prior, posterior_predictive, constant_data, attributes)
    legacy = vars(az).get("InferenceData")  # since ArviZ 1 asking for it in another way warns
    if legacy is None:
        return xr.DataTree.from_dict(datasets)
    with warnings.catch_warnings():  # of groups that ArviZ does not know
        warnings.simplefilter("ignore", UserWarning)
        return legacy(**datasets)


def to_datatree(draws: Draws, num_samples: int | None = None, *extra: Any) -> Any:
    """The same groups as an `xarray.DataTree`, which ArviZ 1 reads."""
    import xarray as xr

    return xr.DataTree.from_dict(_datasets(draws, num_samples, *extra))


def _datasets(
    draws: Draws,
    num_samples: int | None,
    prior: Draws | None = None,
    predicted: Mapping[str, Tensor] | None = None,
    constants: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    chains, count, batch = *draws.log_guide.shape[:2], len(draws.prompts)
    if draws.kind in TOGETHER and chains < 3:
        warnings.warn(
            f"these draws are of {chains} SMC run{'s' * (chains > 1)}, within which they depend on each other: the errors that "
            "ArviZ shows of them are too small, and no figure knows better ones. Give smc num_runs=8, or so",
            stacklevel=3,
        )
    copies = draws.num_samples * (1 if draws.kind in EQUAL else COPIES)
    n = copies if num_samples is None else num_samples
    picks = arranged(draws, draws.reweighted(n).cpu())  # (S, B), or (S, 1) where only the prompts' joint weight exists
    shape = (chains, count) if draws.kind in EQUAL and n == draws.num_samples else (1, n)

    def posterior(name: str, value: Tensor, site: str | None = None) -> Variable:
        flat = value.cpu().flatten(0, 1)
        rows = picks if flat.shape[1] == picks.shape[1] else picks[:, :1]
        taken = flat[rows, torch.arange(flat.shape[1])]
        return of_draws(
            name, taken.reshape(*shape, *taken.shape[1:]), batch, draws.plates.get(name if site is None else site)
        )

    completions: Variables = {}
    for name in draws.texts:
        tokens = completions[f"{name}_tokens"] = posterior(f"{name}_tokens", draws[name], name)
        completions[f"{name}_text"] = _text(draws, tokens)
    likelihoods = {k: posterior(k, v) for k, v in draws.log_likelihoods.items()}
    groups: dict[str, Variables] = {
        "posterior": {k: posterior(k, v, _site(draws, k)) for k, v in scalars(draws).items()},
        "completions": completions,
        "log_likelihood": {k: v for k, v in likelihoods.items() if k not in draws.factors},
        "unnormalised_log_likelihood": {k: v for k, v in likelihoods.items() if k in draws.factors},
        "log_prior": {"latent": posterior("latent", draws.log_prior)},
        "guide": {k: _raw(draws, k, v) for k, v in _all_of(draws).items()},
        "sample_stats": {k: _stat(draws, k, v) for k, v in draws.stats.items()},
        "observed_data": {k: of_observed(k, v, draws.plates.get(k), batch) for k, v in draws.observed.items()},
        "constant_data": {
            "prompt_text": (("prompt",), np.array(prompt_texts(draws.prompts)), {}),
            **{k: of_constant(k, np.asarray(v), batch) for k, v in (constants or {}).items()},
        },
    }
    if draws.kind not in EQUAL:
        groups["sample_stats"]["log_weight"] = of_draws("log_weight", draws.log_weight, batch, None)
    if prior is not None:
        groups["prior"] = {k: _raw(prior, k, v) for k, v in {**scalars(prior), **_log_probabilities(prior)}.items()}
        tokens = {f"{name}_tokens": _raw(prior, f"{name}_tokens", prior[name]) for name in prior.texts}
        groups["prior_completions"] = tokens | {f"{n}_text": _text(prior, tokens[f"{n}_tokens"]) for n in prior.texts}
        groups["sample_stats_prior"] = {k: _raw(prior, k, v) for k, v in prior.stats.items()}
    if draws.proposals is not None:
        groups["proposals"] = {k: _raw(draws.proposals, k, v) for k, v in _log_probabilities(draws.proposals).items()}
    if predicted is not None:
        made = {k: posterior(k, v) for k, v in predicted.items()}
        groups["posterior_predictive"] = {k: (dims, whole(v), role) for k, (dims, v, role) in made.items()}
    attached = {**_attributes(draws, picks), **(attributes or {})}
    own: dict[str, Any] = {}
    if prior is not None:
        own = dict.fromkeys(("prior", "prior_completions", "sample_stats_prior"), _cost(prior))
    names = distinct(map(storable, draws.prompts.names))
    return {
        name: dataset(variables, attached | own.get(name, {}), names) for name, variables in groups.items() if variables
    }


def _site(draws: Draws, name: str) -> str:
    """The site that a number comes from: a text's length, from the text; log-probabilities from none, whatever sites are
    called like them."""
    if name in (*LOG_PROBABILITIES, "log_weight"):
        return ""
    return next((text for text in draws.texts if name == length_name(text) and name not in draws.latents), name)


def _all_of(draws: Draws) -> dict[str, Tensor]:
    """All that is known of each draw, (C, S, B, ...). A record that has the name of a log-probability gives way to it."""
    tokens = {f"{name}_tokens": draws[name] for name in draws.texts}
    numbers = {k: v for k, v in (*draws.records.items(), *draws.latents.items()) if k not in draws.texts}
    return {**numbers, **tokens, **_log_probabilities(draws), "log_weight": draws.log_weight}


def _log_probabilities(draws: Draws) -> dict[str, Tensor]:
    return {name: getattr(draws, name) for name in LOG_PROBABILITIES}


def _raw(draws: Draws, name: str, value: Tensor) -> Variable:
    """Of the draws as they came, with what it takes to read it back: whether it is a latent site, and whether all prompts
    share it."""
    text = name.removesuffix("_tokens")
    plates = draws.plates.get(text if text in draws.texts else _site(draws, name))
    dims, numbers, _ = of_draws(name, value, len(draws.prompts), plates)
    return dims, numbers, {"latent": int(name in draws.latents), "shared": int("prompt" not in dims)}


def _stat(draws: Draws, name: str, value: Tensor) -> Variable:
    """What all draws of a run share, (C, 1, B, T), is by chain, prompt and token."""
    dims, numbers, role = _raw(draws, name, value)
    if value.shape[1] == draws.log_guide.shape[1] or value.dim() != 4:
        return dims, numbers, role
    return (dims[0], *dims[2:-1], "token"), numbers[:, 0], role


def _text(draws: Draws, variable: Variable) -> Variable:
    dims, tokens, _ = variable
    x = torch.as_tensor(tokens)
    if "prompt" not in dims:
        decoded = np.array([storable(text) for text in draws.prompts.vocabulary.decode(x.flatten(0, -2))], dtype=str)
        return dims[:-1], decoded.reshape(x.shape[:-1]), {}
    place = dims.index("prompt")
    x = x.movedim(place, -2)  # (..., B, T)
    decoded = np.array([storable(text) for text in draws.prompts.decode(x)], dtype=str)
    return dims[:-1], np.moveaxis(decoded.reshape(x.shape[:-1]), -1, place), {}


def prompt_texts(prompts: Prompts) -> list[str]:
    """The prompts as they were given, chats as Python writes them."""
    return [storable(t if isinstance(t, str) else repr(t)) for t in prompts.texts]


def _attributes(draws: Draws, picks: Tensor) -> dict[str, Any]:
    versions = {
        f"{name.replace('-', '_')}_version": version(name) for name in ("torch", "pyro-ppl", "transformers", "arviz")
    }
    attributes: dict[str, Any] = {
        "inference_library": "ppl_lm",
        "inference_library_version": version("ppl_lm"),
        **versions,
        "kind": draws.kind,
        "lacks_support": int(draws.lacks_support),
        "num_samples": len(picks),
        "unique_fraction": float(np.mean([len(set(column.tolist())) / len(picks) for column in picks.T])),
        **_cost(draws),
    }
    amounts = [] if draws.kind == "chains" else ess(draws).tolist()  # ArviZ finds what chains are worth: az.ess
    known = [amount for amount in amounts if not math.isnan(amount)]
    if known:
        attributes["weighted_ess"] = float(np.mean(known))
    return attributes


def _cost(draws: Draws) -> dict[str, int]:
    return {"lm_tokens": draws.cost.lm_tokens, "reward_calls": draws.cost.reward_calls}
