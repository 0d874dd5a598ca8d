"""`to_arviz`: draws as what ArviZ reads, in either of its two lives."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_lm import __version__
from ppl_lm.diagnose.drawn import worth
from ppl_lm.infer import Draws

Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]  # name -> dimensions, values
DRAWN = ("chain", "draw", "prompt")


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
    - `guide`: the raw draws with their tokens, records, log-probabilities and weights, nats. `az.psislw` takes `log_weight`.
    - `sample_stats`: how each draw came about, such as the acceptance rates of Markov chains.
    - `prior`, `posterior_predictive`: where they are given, below.
    - `observed_data`: what the model observed. `constant_data`: `prompt_text`, and what is given.

    Attributes: versions, the draws' kind and cost, how many of the posterior's draws are different ones of the guide's
    (`unique_fraction`), and what the weighted ones are worth (`weighted_ess`).

    :param num_samples: draws in `posterior`; by default as many as were given.
    :param prior: draws of the model's prior: `importance(model, None, prompts)`.
    :param posterior_predictive: replicates of observed sites for each draw: `replicate(model, draws)`.
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
    n = num_samples or draws.num_samples
    picks = draws.reweighted(n).cpu().expand(-1, batch)  # (S, B)
    shape = (chains, count) if (draws.exact or draws.markov) and n == draws.num_samples else (1, n)
    column = torch.arange(batch)

    def posterior(name: str, value: Tensor) -> tuple[tuple[str, ...], np.ndarray]:
        taken = _each(value, batch).flatten(0, 1)[picks, column]
        return _named(name, taken.reshape(*shape, *taken.shape[1:]))

    def raw(name: str, value: Tensor) -> tuple[tuple[str, ...], np.ndarray]:
        return _named(name, _each(value, batch))

    texts = {name: draws.latents[name] for name in draws.texts}
    completions: Variables = {}
    for name, value in texts.items():
        dims, tokens = completions[f"{name}_tokens"] = posterior(f"{name}_tokens", value)
        flat = torch.as_tensor(tokens).reshape(-1, tokens.shape[-1])
        decoded = np.array(draws.prompts.vocabulary.decode(flat), dtype=str)
        completions[f"{name}_text"] = (dims[:-1], decoded.reshape(tokens.shape[:-1]))
    kept = {k: getattr(draws, k) for k in ("log_prior", "log_likelihood", "log_guide", "log_weight")}
    kept |= {f"{name}_tokens": value for name, value in texts.items()} | draws.records
    made: dict[str, Variables] = {
        "posterior": {k: posterior(k, v) for k, v in _scalars(draws).items()},
        "completions": completions,
        "log_likelihood": {k: posterior(k, v) for k, v in draws.log_likelihoods.items()},
        "log_prior": {"latent": posterior("latent", draws.log_prior)},
        "guide": {k: raw(k, v) for k, v in kept.items()},
        "sample_stats": {k: raw(k, v) for k, v in draws.stats.items()},
        "observed_data": {k: _data(k, v.cpu().numpy(), batch) for k, v in draws.observed.items()},
        "constant_data": {
            "prompt_text": (("prompt",), np.array([t if isinstance(t, str) else repr(t) for t in draws.prompts.texts])),
            **{k: _data(k, np.asarray(v), batch) for k, v in (constants or {}).items()},
        },
    }
    if prior is not None:
        made["prior"] = {k: _named(k, _each(v, batch)) for k, v in _scalars(prior).items()}
    if predicted is not None:
        made["posterior_predictive"] = {k: posterior(k, v) for k, v in predicted.items()}
    told = {**_attributes(draws, picks), **(attributes or {})}
    return {name: _dataset(variables, told) for name, variables in made.items() if variables}


def _scalars(draws: Draws) -> dict[str, Tensor]:
    """What is a number, float64, (C, S, B, ...)."""
    found = {k: v.double() for k, v in (*draws.records.items(), *draws.latents.items()) if k not in draws.texts}
    for name in draws.texts:
        prefix = "" if name == "x" else f"{name}_"
        found[f"{prefix}length"] = draws.prompts.vocabulary.lengths(draws[name]).double()
    return {**found, "log_prior": draws.log_prior}


def _each(value: Tensor, batch: int) -> Tensor:
    """What all prompts share is repeated."""
    return value.cpu().expand(*value.shape[:2], batch, *value.shape[3:])


def _named(name: str, value: Tensor) -> tuple[tuple[str, ...], np.ndarray]:
    return (*DRAWN, *(f"{name}_dim_{i}" for i in range(value.dim() - 3))), value.numpy()


def _data(name: str, value: np.ndarray, batch: int) -> tuple[tuple[str, ...], np.ndarray]:
    if value.ndim == 1 and len(value) == batch:
        return ("prompt",), value
    return tuple(f"{name}_dim_{i}" for i in range(value.ndim)), value


def _attributes(draws: Draws, picks: Tensor) -> dict[str, Any]:
    versions = {
        f"{name.replace('-', '_')}_version": version(name) for name in ("torch", "pyro-ppl", "transformers", "arviz")
    }
    made: dict[str, Any] = {
        "inference_library": "ppl_lm",
        "inference_library_version": __version__,
        **versions,
        "exact": int(draws.exact),
        "markov": int(draws.markov),
        "num_samples": len(picks),
        "unique_fraction": float(np.mean([len(set(column.tolist())) / len(picks) for column in picks.T])),
        "lm_tokens": draws.cost.lm_tokens,
        "reward_calls": draws.cost.reward_calls,
    }
    ess = [] if draws.markov else [worth(draws.of_prompt(b)) for b in range(draws.log_guide.shape[-1])]
    known = [value for value in ess if value is not None]
    if known:  # ArviZ finds what chains are worth: az.ess
        made["weighted_ess"] = float(np.mean(known))
    return made


def _dataset(variables: Variables, attributes: dict[str, Any]) -> Any:
    import xarray as xr

    sizes = {d: n for dims, value in variables.values() for d, n in zip(dims, value.shape, strict=True)}
    return xr.Dataset(dict(variables), coords={d: np.arange(n) for d, n in sizes.items()}, attrs=attributes)
