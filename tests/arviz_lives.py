"""What ArviZ 0.x and ArviZ 1 call by different names, for tests of what both must do."""

import warnings
from typing import Any

import arviz as az

SINCE_1 = not hasattr(az, "psislw")


def groups(data: Any) -> set[str]:
    """Names of the groups of an `InferenceData` or a `DataTree`."""
    return {*data.children} if SINCE_1 else {*data.groups()}


def dataset(group: Any) -> Any:
    """A group as an xarray `Dataset`."""
    return group.to_dataset() if SINCE_1 else group


def plot_ppc(data: Any, **arguments: Any) -> None:
    """Observed values beside replicates."""
    if SINCE_1:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Variables .* look", UserWarning)
            az.plot_ppc_dist(data, **{"kind": "ecdf", **arguments})  # others fail of what is observed alike everywhere
    else:
        az.plot_ppc(data, num_pp_samples=20, **arguments)
