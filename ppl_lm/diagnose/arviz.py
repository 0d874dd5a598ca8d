"""`to_arviz`: draws as what ArviZ reads, in either of its two lives."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_lm import __version__
from ppl_lm.diagnose.drawn import worth
from ppl_lm.infer import Draws


def groups(draws: Draws, num_samples: int | None = None) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The groups of `to_arviz` as plain arrays, and the attributes.

    `posterior`: equally weighted numbers, dimensions (chain, draw, prompt, ...): weighted draws are resampled, since
    ArviZ's summaries know no weights. `completions`: the tokens and text of the same draws. `guide`: the raw draws with
    their log-probabilities and weights. `sample_stats`: of Markov chains, their acceptance rates.
    """
    chains, count, batch = draws.log_guide.shape
    n = num_samples or draws.num_samples
    picks = draws.reweighted(n)  # (S, B or 1)
    picks = picks.cpu().expand(-1, len(draws.prompts))
    column = torch.arange(len(draws.prompts))
    keep_chains = (draws.exact or draws.markov) and n == draws.num_samples

    def posterior(value: Tensor) -> np.ndarray:
        flat = value.flatten(0, 1).cpu()
        flat = flat.expand(-1, len(column), *flat.shape[2:])  # what all prompts share is repeated
        taken = flat[picks, column]
        shape = (chains, count) if keep_chains else (1, n)
        return taken.reshape(*shape, *taken.shape[1:]).numpy()

    texts = {name: draws.latents[name] for name in draws.texts}
    scalars: dict[str, np.ndarray] = {}
    for name, value in (*draws.records.items(), *draws.latents.items()):
        if name not in texts:
            scalars[name] = posterior(value.double())
    vocabulary = draws.prompts.vocabulary
    completions: dict[str, np.ndarray] = {}
    for name, value in texts.items():
        prefix = "" if name == "x" else f"{name}_"
        scalars[f"{prefix}length"] = posterior(vocabulary.lengths(value).double())
        tokens = posterior(value)
        flat = torch.as_tensor(tokens).reshape(-1, tokens.shape[-1])
        completions[f"{name}_tokens"] = tokens
        completions[f"{name}_text"] = np.array(vocabulary.decode(flat), dtype=str).reshape(tokens.shape[:-1])
    scalars["log_prior"] = posterior(draws.log_prior)
    raw = {
        "log_prior": draws.log_prior,
        "log_likelihood": draws.log_likelihood,
        "log_guide": draws.log_guide,
        "log_weight": draws.log_weight,
    }
    guide = {k: v.expand(chains, count, len(draws.prompts)).cpu().numpy() for k, v in raw.items()}
    for name, value in texts.items():
        guide[f"{name}_tokens"] = value.cpu().numpy()
    for name, value in draws.records.items():
        guide[name] = value.expand(chains, count, len(draws.prompts)).cpu().numpy()
    unique = [len(set(picks[:, b].tolist())) / n for b in range(picks.shape[1])]
    attributes = {
        "ppl_lm_version": __version__,
        "exact": int(draws.exact),
        "num_samples": n,
        "unique_fraction": float(np.mean(unique)),
        "lm_tokens": draws.cost.lm_tokens,
        "reward_calls": draws.cost.reward_calls,
    }
    ess = [] if draws.markov else [worth(draws.of_prompt(b)) for b in range(draws.log_guide.shape[-1])]
    known = [value for value in ess if value is not None]
    if known:  # ArviZ finds what chains are worth: az.ess
        attributes["weighted_ess"] = float(np.mean(known))
    prompts = np.array([t if isinstance(t, str) else repr(t) for t in draws.prompts.texts], dtype=str)
    made = {
        "posterior": scalars,
        "completions": completions,
        "guide": guide,
        "sample_stats": {k: v.expand(chains, count, len(draws.prompts)).cpu().numpy() for k, v in draws.stats.items()},
        "constant_data": {"prompt_text": prompts},
    }
    return made, attributes


def to_arviz(draws: Draws, num_samples: int | None = None) -> Any:
    """An `arviz.InferenceData`, or with ArviZ 1 an `xarray.DataTree`; see `groups` for what is in it.

    :param num_samples: draws in `posterior`; by default as many as were given.
    """
    import arviz as az

    if not hasattr(az, "InferenceData"):
        return to_datatree(draws, num_samples)
    return az.InferenceData(warn_on_custom_groups=False, **_datasets(draws, num_samples))


def to_datatree(draws: Draws, num_samples: int | None = None) -> Any:
    """The same groups as an `xarray.DataTree`, which ArviZ 1 reads."""
    import xarray as xr

    return xr.DataTree.from_dict(_datasets(draws, num_samples))


def _datasets(draws: Draws, num_samples: int | None) -> dict[str, Any]:
    made, attributes = groups(draws, num_samples)
    return {name: _dataset(variables, attributes) for name, variables in made.items() if variables}


def _dataset(variables: dict[str, np.ndarray], attributes: dict[str, Any]) -> Any:
    import xarray as xr

    arrays, coords = {}, {}
    for name, value in variables.items():
        extra = [f"{name}_dim_{i}" for i in range(value.ndim - 3)]
        dims = ("chain", "draw", "prompt", *extra) if value.ndim > 1 else ("prompt",)
        arrays[name] = (dims, value)
        coords.update({d: np.arange(n) for d, n in zip(dims, value.shape, strict=True)})
    return xr.Dataset(arrays, coords=coords, attrs=attributes)
