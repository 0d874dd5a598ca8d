"""`SequenceKernel`: Markov chains over text as a kernel of Pyro's own `MCMC`."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.samplers.importance_sampling import draw, require_prompts
from ppl_lm.infer.samplers.importance_sampling import require_support as require_whole
from ppl_lm.infer.samplers.kernels import Kernel, suffix
from ppl_lm.infer.samplers.markov_chains import CLAIM, require_support, step
from ppl_lm.infer.traces.layout import Given
from ppl_lm.infer.traces.structure import nesting_of


class SequenceKernel(MCMCKernel):
    """Metropolis-Hastings over whole texts for `pyro.infer.MCMC`: the steps of `ppl_lm.mcmc`, one chain at a time.

    >>> chain = MCMC(SequenceKernel(target, guide), num_samples=1000, warmup_steps=200)  # doctest: +SKIP
    >>> chain.run(["The soup was"])                                                      # doctest: +SKIP
    >>> chain.get_samples()["x"]                            # (1000, B, T) token ids       # doctest: +SKIP

    Samples are laid out as in `Draws`, the prompts first, and keep their dtype. `MCMC.summary` and `MCMC.diagnostics`
    average what they are given and so refuse token ids; `diagnostics` of the kernel has the acceptance rates. A chain
    costs what two do in `mcmc`, which is the faster with several, and whose draws ArviZ reads.

    :param guide: proposes; None proposes from the model's own prior.
    :param kernel: `suffix` or `independence`, or any function of that signature.
    :raises NoSupportError: if a chain has met no possible text by the end of its warm-up.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None = None,
        *,
        kernel: Kernel = suffix,
        max_plate_nesting: int | None = None,
    ):
        self.model, self.guide, self.kernel, self.max_plate_nesting = model, guide, kernel, max_plate_nesting
        self.transforms: dict[str, _As] | None = None  # Pyro calls `setup` where it finds none
        self._start: dict[str, Tensor] | None = None

    def setup(self, warmup_steps: int, prompts: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        prompts = read_once(prompts, self.model, self.guide)
        self._prompts, self._warmup, self._steps, self._counted = prompts, warmup_steps, 0, 0
        require_prompts(prompts)
        self._nesting = nesting_of(self.max_plate_nesting, self.model, self.guide, prompts)
        self._propose = self.kernel(self.model, self.guide, prompts, self._nesting)
        start, self._start = self._start, None
        self._enter(self._fresh() if start is None else self._at(start))
        self._rates = torch.zeros_like(self._state.log_guide[0, 0])
        self.transforms = {name: _As(value.dtype) for name, value in self._state.latents.items()}

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Site name -> its value, (B, *inner, *event); by default a draw of the guide."""
        return self._params if self._start is None else self._start

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._start = params

    @torch.no_grad()
    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The chain's next values, from `params`."""
        if params is not self._params:
            self._enter(self._at(params))
        if self._steps == self._warmup:
            require_support(self._state.map(lambda v: v[:, :1]))
            self._rates, self._counted = torch.zeros_like(self._rates), 0
        state, info = step(self._state, self._propose)
        self._enter(state)
        self._rates = self._rates + info.log_accept[0].exp()
        self._steps, self._counted = self._steps + 1, self._counted + 1
        return self._params

    def logging(self) -> dict[str, str]:
        rate = self.diagnostics()["acceptance_rate"].mean()
        return OrderedDict({"acc. rate": f"{float(rate):.3f}"})

    def diagnostics(self) -> dict[str, Tensor]:
        """`acceptance_rate`: the mean of α over the steps after the warm-up, or while it lasts over its own, (B,)."""
        return {"acceptance_rate": self._rates / self._counted}

    def _enter(self, state: Draws) -> None:
        """A state holds two chains, (1, 2, B), since a plate of one particle would have no dimension: the first is the
        chain, the other is never looked at."""
        self._state, self._params = state, {name: value[0, 0] for name, value in state.latents.items()}

    @torch.no_grad()
    def _fresh(self) -> Draws:
        state = draw(self.model, self.guide, self._prompts, 2, self._nesting)
        require_whole(not state.lacks_support, CLAIM)
        return state

    def _at(self, params: dict[str, Tensor]) -> Draws:
        with Given({name: torch.stack([value, value]) for name, value in params.items()}, self._nesting):
            state = self._fresh()
        if state.latents.keys() != params.keys():
            raise ValueError(f"got values of {sorted(params)}; this program's latent sites are {sorted(state.latents)}")
        return state


class _As:
    """The identity, back to a site's dtype: Pyro joins the sites' values in one tensor of one dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def inv(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)
