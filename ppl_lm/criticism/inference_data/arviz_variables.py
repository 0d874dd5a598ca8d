"""One variable of what ArviZ reads: values with named dimensions, and a group of them as a dataset."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Variable = tuple[tuple[str, ...], np.ndarray, dict[str, Any]]  # dimensions, values, attributes
Variables = dict[str, Variable]
OWN = ("chain", "draw", "prompt", "token")  # dimensions that no plate may be called like


def of_draws(name: str, value: Tensor, batch: int, plates: Sequence[str | None] | None) -> Variable:
    """Values of a site, (C, S, B, *inner, *event), by chain, draw, prompt and plate; without the prompt where all share them.

    :param plates: names after (C, S), None of a dimension without a plate; None: where it is not known, and all that is not
        shared by several prompts is of each prompt."""
    value = value.detach().cpu()
    plates = ("prompt" if value.shape[2] == batch else None,) if plates is None else plates
    if plates[0] is None:
        value, plates = value.squeeze(2), plates[1:]
    return ("chain", "draw", *_dimensions(name, value.dim() - 2, plates)), value.numpy(), {}


def of_observed(name: str, value: Tensor, plates: Sequence[str | None] | None, batch: int) -> Variable:
    """What was observed, (B, *inner, *event). Whole numbers are stored as such, since ArviZ draws them as bars; with the dtype
    and the plates that they had."""
    if plates is None:
        plates = ("prompt",) if value.shape == (batch,) else ()
    kept = {"dtype": str(value.dtype).removeprefix("torch."), "plates": json.dumps(plates)}
    plates = plates[1:] if plates and plates[0] is None else plates
    return _dimensions(name, value.dim(), plates), whole(value.detach().cpu().numpy()), kept


def whole(values: np.ndarray) -> np.ndarray:
    """Numbers of which each is whole as int64, others as they are."""
    if values.dtype.kind != "f" or not np.all(np.isfinite(values)) or np.any(values != np.trunc(values)):
        return values
    return values.astype(np.int64)


def of_constant(name: str, value: np.ndarray, batch: int) -> Variable:
    return _dimensions(name, value.ndim, ("prompt",) if value.shape == (batch,) else ()), value, {}


def _dimensions(name: str, count: int, plates: Sequence[str | None]) -> tuple[str, ...]:
    named = [
        p if p is None or (p == "prompt" and i == 0) or p not in OWN else f"{p}_plate" for i, p in enumerate(plates)
    ]
    free = (f"{name}_dim_{i}" for i in range(count))
    return tuple(plate or next(free) for plate in [*named, *[None] * (count - len(named))])


def plates_of(name: str, dims: Sequence[str]) -> tuple[str | None, ...]:
    """The way back: `plates` of a variable whose dimensions after chain and draw are these."""
    first = dims[:1] if "prompt" in dims else [None]
    inner = [None if d.startswith(f"{name}_dim_") else d for d in dims if d != "prompt"]
    while inner and inner[-1] is None:
        inner.pop()
    return (*first, *inner)


def dataset(variables: Variables, attributes: Mapping[str, Any], prompts: Sequence[str]) -> Any:
    """An `xarray.Dataset`: prompts have their names as coordinates, all else counts from 0."""
    import xarray as xr

    sizes: dict[str, int] = {"prompt": len(prompts)}
    plain, names = {}, {stored(name) for name in variables}
    for name, (dims, value, role) in variables.items():
        dims = [stored(dim) for dim in dims]
        for i, n in enumerate(value.shape):  # no dimension has two sizes, nor the name of a variable
            if dims[i] in names or sizes.get(dims[i], n) != n:
                dims[i] = f"{stored(name)}_{dims[i]}"
            sizes[dims[i]] = n
        plain[stored(name)] = (tuple(dims), value, role)
    used = {dim for dims, _, _ in plain.values() for dim in dims}
    coordinates = {dim: np.arange(n) for dim, n in sizes.items() if dim in used and dim != "prompt"}
    if "prompt" in used:
        coordinates["prompt"] = np.array(prompts, dtype=str)
    return xr.Dataset(plain, coords=coordinates, attrs=dict(attributes))


def stored(name: str) -> str:
    """A site's name in NetCDF, where "/" (of Pyro's `scope`, say) parts groups: "." instead."""
    return name.replace("/", ".")


def storable(text: str) -> str:
    """What NetCDF's strings can hold: no NUL, which a byte-level vocabulary may write, and no half of a surrogate pair."""
    return text.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()
