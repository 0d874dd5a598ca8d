"""What ArviZ 0.x and ArviZ 1 call by different names, for tests of what both must do."""

from typing import Any

import arviz as az

SINCE_1 = not hasattr(az, "psislw")


def groups(data: Any) -> set[str]:
    """Names of the groups of an `InferenceData` or a `DataTree`."""
    return {*data.children} if SINCE_1 else {*data.groups()}


def plot_ppc(data: Any, **arguments: Any) -> None:
    """Observed values beside replicates."""
    if SINCE_1:
        az.plot_ppc_dist(data, **arguments)
    else:
        az.plot_ppc(data, num_pp_samples=20, **arguments)
