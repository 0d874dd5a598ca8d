"""`from_arviz`: draws from what `to_arviz` wrote."""

import json
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from ppl_lm.criticism.inference_data.arviz_groups import LOG_PROBABILITIES, prompt_texts
from ppl_lm.criticism.inference_data.arviz_variables import plates_of
from ppl_lm.criticism.statistics import length_name
from ppl_lm.infer.draws import Draws, Kind
from ppl_lm.lm.meter import Cost
from ppl_lm.lm.prompts import Prompts


def from_arviz(data: Any, prompts: Prompts, group: str = "guide") -> Draws:
    """The draws that `to_arviz` put into the group `guide` or `prior`, for another look at them.

    The share of each observed site in the likelihood is not in the file; nor are records that have the name of a
    log-probability.

    :param data: what `to_arviz` made, or `arviz.from_netcdf` read.
    :param prompts: the same ones, of the same language model: `lm.prompts([...])`.
    :raises ValueError: if the group is not there, or the prompts are others."""
    if not isinstance(prompts, Prompts):
        raise ValueError(f"prompts={prompts!r}; give those of the language model, lm.prompts([...])")
    if group not in (known := {"guide": "guide", "prior": "prior_completions"}):
        raise ValueError(f"group={group!r}; give one of {', '.join(known)}")
    try:
        raw, tokens = data[group], data[known[group]]
    except KeyError:
        raise ValueError(f"there is no group {known[group]!r}: `to_arviz(..., prior=...)` writes the prior's") from None
    there, given = data["constant_data"]["prompt_text"].values.tolist(), prompt_texts(prompts)
    if there != given:
        first = next(
            (i for i, (a, b) in enumerate(zip(there, given, strict=False)) if a != b), min(len(there), len(given))
        )
        named = [repr(texts[first])[:60] if first < len(texts) else "none" for texts in (there, given)]
        raise ValueError(
            f"these are not the prompts of the draws: of theirs number {first} is {named[0]}, of these {named[1]}"
        )

    def read(source: Any, latent: bool | None = None) -> dict[str, Tensor]:
        """Numbers and tokens by name; where `latent` is given, only what is a latent site, or is none."""
        values = {}
        for name, value in source.data_vars.items():
            known = value.dtype.kind in "fiub" and "shared" in value.attrs
            if known and (latent is None or latent == bool(value.attrs["latent"])):
                numbers = torch.as_tensor(value.values)
                numbers = numbers if "draw" in value.dims else numbers.unsqueeze(1)  # what the draws of a run share
                numbers = numbers if "prompt" in value.dims else numbers.unsqueeze(2)  # what the prompts share
                values[str(name)] = numbers[:, :, : 1 if value.attrs["shared"] else None]
        return values

    x = {name.removesuffix("_tokens"): v for name, v in read(tokens).items() if name.endswith("_tokens")}
    records, latents = read(raw, latent=False), read(raw, latent=True)
    log_p: Any = {name: records.pop(name) for name in LOG_PROBABILITIES}
    derived = ("log_weight", *(f"{name}_tokens" for name in x), *(map(length_name, x) if group == "prior" else ()))
    records = {name: value for name, value in records.items() if name not in derived}
    how = "sample_stats_prior" if group == "prior" else "sample_stats"
    groups = set(data.children if hasattr(data, "children") else data.groups())
    stats = read(data[how]) if how in groups else {}  # without log_weight, which follows from the others
    plates = {name: _plates(raw[name], 2) for name in (*latents, *records)} | {
        n: _plates(tokens[f"{n}_tokens"], 2) for n in x
    }
    cost = Cost(int(raw.attrs["lm_tokens"]), int(raw.attrs["reward_calls"]))
    draws = Draws(prompts, {**latents, **x}, records, **log_p, cost=cost, stats=stats, texts=tuple(x), plates=plates)
    if group == "prior":
        return draws
    if raw.attrs.get("kind") not in get_args(Kind):
        raise ValueError(
            "these draws were written by an earlier version of ppl_lm, which did not tell their kind: draw again"
        )
    all_of: Any = read(data["proposals"]) if "proposals" in groups else None
    seen = data["observed_data"].data_vars if "observed_data" in groups else {}
    return replace(
        draws,
        observed={str(name): _observed(value) for name, value in seen.items()},
        plates=plates | {str(name): _plates(value, 0) for name, value in seen.items()},
        proposals=None if all_of is None else Draws(prompts, {}, {}, **all_of),
        kind=raw.attrs["kind"],
        lacks_support=bool(raw.attrs.get("lacks_support", 0)),
    )


def _plates(variable: Any, skipped: int) -> tuple[str | None, ...]:
    if "plates" in variable.attrs:
        return tuple(json.loads(variable.attrs["plates"]))
    return plates_of(str(variable.name), [*map(str, variable.dims)][skipped:])


def _observed(variable: Any) -> Tensor:
    values = torch.as_tensor(variable.values)
    return values.to(getattr(torch, variable.attrs["dtype"])) if "dtype" in variable.attrs else values
