"""Between Pyro's layout of values, particles first and prompts last, and that of draws."""

from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_lm.infer.traces.sites import Site

ROWS = 2048  # texts drawn at a time


def prompts_first(site: Site, nesting: int) -> Tensor:
    """A site's value, (n, *plates, B, *event) as Pyro has it, as (n, B, *plates, *event)."""
    value = site["value"].movedim(nesting, 1)
    used = {f.dim for f in site["cond_indep_stack"]}
    for dim in range(-nesting, -1):  # leftmost plate first
        if dim in used:
            break
        value = value.squeeze(2)
    return value


class Given(Messenger):
    """Sites take the values that draws hold, in Pyro's layout: the way back from `prompts_first`."""

    def __init__(self, values: dict[str, Tensor], nesting: int):
        super().__init__()
        self.values, self.nesting = values, nesting

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["name"] not in self.values:
            return
        value = self.values[msg["name"]]
        missing = self.nesting + 1 - (value.dim() - msg["fn"].event_dim)
        value = value.reshape(*value.shape[:2], *[1] * missing, *value.shape[2:]).movedim(1, self.nesting)
        msg["value"], msg["done"] = (value if len(value) > 1 else value[0]), True
