"""`to_arviz`: draws as what ArviZ reads, in either of its two lives."""

import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_lm.criticism.effective_size import ess
from ppl_lm.infer.draws import EQUAL, Draws
from ppl_lm.lm.prompts import Prompts

Variable = tuple[tuple[str, ...], np.ndarray, dict[str, int]]  # dimensions, values, attributes
Variables = dict[str, Variable]
DIMENSIONS = ("chain", "draw", "prompt")
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
    """An `arviz.InferenceData`, or with ArviZ 1 an `xarray.DataTree`. Its groups, with dimensions (chain, draw, prompt, ...):

    - `posterior`: equally weighted numbers: the reward and the model's other records, lengths, log p of the prior (nats), and
      latent sites that are no text. Weighted draws are resampled, since ArviZ's summaries know no weights.
    - `completions`: tokens and text of the same draws; `log_likelihood`: of each observed site, nats; `log_prior`: of the
      latent sites together, nats: what `az.psens` scales.
    - `guide`: the raw draws with their tokens, numbers, log-probabilities and weights, nats. `az.psislw` takes `log_weight`.
    - `proposals`: log-probabilities of all that a sampler proposed, which discards some, and by which its evidence is known.
    - `sample_stats`: how each draw came about, such as the acceptance rates of Markov chains; how each run of SMC did, by
      (chain, prompt, token).
    - `prior`: where it is given, the prior's draws: numbers and log-probabilities; their tokens and texts are in
      `prior_completions`, how each came about in `sample_stats_prior`. `posterior_predictive`: where it is given, below.
    - `observed_data`: what the model observed. `constant_data`: `prompt_text`, and what is given.

    Attributes: versions, the draws' kind and cost, how many of the posterior's draws are different ones of the guide's
    (`unique_fraction`), and what the weighted ones are worth (`weighted_ess`).

    :param num_samples: draws in `posterior`; by default as many as were given.
    :param prior: draws of the model's prior: `importance(model, None, prompts)`.
    :param posterior_predictive: replicates of observed sites for each draw: `predictive(model, draws)`.
    :param constant_data: numbers, texts, or arrays, such as {"beta": 0.2}.
    :param attributes: more of them, such as {"seed": 0}.
    """
    import arviz as az

    extra = (prior, posterior_predictive, constant_data, attributes)
    if not hasattr(az, "InferenceData"):
        return to_datatree(draws, num_samples, *extra)
    return az.InferenceData(warn_on_custom_groups=False, **_datasets(draws, num_samples, *extra))


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
    n = draws.num_samples if num_samples is None else num_samples
    picks = draws.reweighted(n).cpu().expand(-1, batch)  # (S, B)
    shape = (chains, count) if draws.kind in EQUAL and n == draws.num_samples else (1, n)
    column = torch.arange(batch)

    def posterior(name: str, value: Tensor) -> Variable:
        taken = _each(value, batch).flatten(0, 1)[picks, column]
        return _named(name, taken.reshape(*shape, *taken.shape[1:]))

    def raw(name: str, value: Tensor) -> Variable:
        """With what it takes to read it back: whether it is a latent site, and whether all prompts share it."""
        role = {"latent": int(name in draws.latents), "shared": int(value.shape[2] < batch)}
        return (*_named(name, _each(value, batch))[:2], role)

    def stat(name: str, value: Tensor) -> Variable:
        """What all draws of a run share, (C, 1, B, T), is by chain, prompt and token."""
        if value.shape[1] == draws.log_guide.shape[1] or value.dim() != 4:
            return raw(name, value)
        _, numbers, role = raw(name, value)
        return ("chain", "prompt", "token"), numbers[:, 0], role

    completions: Variables = {}
    for name in draws.texts:
        tokens = completions[f"{name}_tokens"] = posterior(f"{name}_tokens", draws[name])
        completions[f"{name}_text"] = _text(draws, tokens)
    groups: dict[str, Variables] = {
        "posterior": {k: posterior(k, v) for k, v in _scalars(draws).items()},
        "completions": completions,
        "log_likelihood": {k: posterior(k, v) for k, v in draws.log_likelihoods.items()},
        "log_prior": {"latent": posterior("latent", draws.log_prior)},
        "guide": {k: raw(k, v) for k, v in _raw(draws).items()},
        "sample_stats": {k: stat(k, v) for k, v in draws.stats.items()},
        "observed_data": {k: _data(k, v.cpu().numpy(), batch) for k, v in draws.observed.items()},
        "constant_data": {
            "prompt_text": (("prompt",), np.array(prompt_texts(draws.prompts)), {}),
            **{k: _data(k, np.asarray(v), batch) for k, v in (constants or {}).items()},
        },
    }
    if prior is not None:
        groups["prior"] = {k: raw(k, v) for k, v in {**_scalars(prior), **_log_probabilities(prior)}.items()}
        tokens = {f"{name}_tokens": raw(f"{name}_tokens", prior[name]) for name in prior.texts}
        groups["prior_completions"] = tokens | {f"{n}_text": _text(prior, tokens[f"{n}_tokens"]) for n in prior.texts}
        groups["sample_stats_prior"] = {k: raw(k, v) for k, v in prior.stats.items()}
    if draws.proposals is not None:
        groups["proposals"] = {k: raw(k, v) for k, v in _log_probabilities(draws.proposals).items()}
    if predicted is not None:
        groups["posterior_predictive"] = {k: posterior(k, v) for k, v in predicted.items()}
    attached = {**_attributes(draws, picks), **(attributes or {})}
    own: dict[str, Any] = {}
    if prior is not None:
        own = dict.fromkeys(("prior", "prior_completions", "sample_stats_prior"), _cost(prior))
    return {name: _dataset(variables, attached | own.get(name, {})) for name, variables in groups.items() if variables}


def _scalars(draws: Draws) -> dict[str, Tensor]:
    """What is a number, float64, (C, S, B, ...)."""
    scalars = {k: v.double() for k, v in (*draws.records.items(), *draws.latents.items()) if k not in draws.texts}
    for name in draws.texts:
        scalars[length_name(name)] = draws.prompts.vocabulary.lengths(draws[name]).double()
    return {**scalars, "log_prior": draws.log_prior}


def length_name(text: str) -> str:
    return "length" if text == "x" else f"{text}_length"


def _raw(draws: Draws) -> dict[str, Tensor]:
    """All that is known of each draw, (C, S, B, ...). A record that has the name of a log-probability gives way to it."""
    tokens = {f"{name}_tokens": draws[name] for name in draws.texts}
    numbers = {k: v for k, v in (*draws.records.items(), *draws.latents.items()) if k not in draws.texts}
    return {**numbers, **tokens, **_log_probabilities(draws), "log_weight": draws.log_weight}


def _log_probabilities(draws: Draws) -> dict[str, Tensor]:
    return {name: getattr(draws, name) for name in LOG_PROBABILITIES}


def _text(draws: Draws, variable: Variable) -> Variable:
    dims, tokens, _ = variable
    x = torch.as_tensor(tokens).movedim(2, -2)  # (C, S, *inner, B, T)
    decoded = np.array([_storable(text) for text in draws.prompts.decode(x)], dtype=str)
    return dims[:-1], np.moveaxis(decoded.reshape(x.shape[:-1]), -1, 2), {}


def prompt_texts(prompts: Prompts) -> list[str]:
    return [_storable(t if isinstance(t, str) else repr(t)) for t in prompts.texts]


def _storable(text: str) -> str:
    """What NetCDF's strings can hold: no NUL, which a byte-level vocabulary may write, and no half of a surrogate pair."""
    return text.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()


def _each(value: Tensor, batch: int) -> Tensor:
    """What all prompts share is repeated."""
    return value.cpu().expand(*value.shape[:2], batch, *value.shape[3:])


def _named(name: str, value: Tensor) -> Variable:
    return (*DIMENSIONS, *(f"{name}_dim_{i}" for i in range(value.dim() - 3))), value.numpy(), {}


def _data(name: str, value: np.ndarray, batch: int) -> Variable:
    if value.ndim == 1 and len(value) == batch:
        return ("prompt",), value, {}
    return tuple(f"{name}_dim_{i}" for i in range(value.ndim)), value, {}


def _attributes(draws: Draws, picks: Tensor) -> dict[str, Any]:
    versions = {
        f"{name.replace('-', '_')}_version": version(name) for name in ("torch", "pyro-ppl", "transformers", "arviz")
    }
    attributes: dict[str, Any] = {
        "inference_library": "ppl_lm",
        "inference_library_version": version("ppl_lm"),
        **versions,
        "kind": draws.kind,
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


def _dataset(variables: Variables, attributes: dict[str, Any]) -> Any:
    import xarray as xr

    plain = {stored(k): (tuple(map(stored, dims)), value, role) for k, (dims, value, role) in variables.items()}
    sizes = {d: n for dims, value, _ in plain.values() for d, n in zip(dims, value.shape, strict=True)}
    return xr.Dataset(plain, coords={d: np.arange(n) for d, n in sizes.items()}, attrs=attributes)


def stored(name: str) -> str:
    """A site's name in NetCDF, where "/" (of Pyro's `scope`, say) parts groups: "." instead."""
    return name.replace("/", ".")
