"""A bound program's trainable weights in Pyro's parameter store: under a name that lasts, and back from what was loaded."""

import itertools
import weakref
from contextlib import suppress

import pyro
import torch
from pyro.ops.provenance import detach_provenance
from pyro.params.param_store import _MODULE_NAMESPACE_DIVIDER as DIVIDER
from torch import Tensor, nn

_bound: "weakref.WeakSet[StoredWeights]" = weakref.WeakSet()  # of all programs that are alive


class StoredWeights:
    """What one bound program has in the store.

    :param name: under which its weights stand there, `name$$$argument.weight`; None: the program's own, numbered if a program
        that is alive has it.
    """

    def __init__(self, name: str | None, program: str):
        if name is not None and (not isinstance(name, str) or not name or DIVIDER in name):
            raise ValueError(f"name={name!r}; give a text without {DIVIDER!r}, such as name='guide'")
        taken = {other.name for other in _bound}
        numbered = (f"{program}_{n}" if n else program for n in itertools.count())
        self.name = next(own for own in numbered if own not in taken) if name is None else name
        self.is_named = name is not None
        self.registered: dict[str, Tensor] = {}
        _bound.add(self)
        weakref.finalize(self, _forget, self.registered).atexit = False

    def register(self, networks: nn.Module) -> None:
        """Shows the weights to Pyro, as `pyro.module` does, but for its warning about each frozen one; first takes over what
        was loaded, as `update_module_params=True` does, but in place: torch's optimisers hold on to the same tensors.

        :raises ValueError: if what was loaded is not of these weights, or a handler puts something in their place."""
        self.load(networks)
        store = pyro.get_param_store()
        stored = dict(store.named_parameters())
        for key, weight in self._weights(networks).items():
            if stored.get(key, weight) is not weight:  # of another program of that name, or one that was there before
                del store[key]
            if not weight.is_contiguous():  # of which the store would make a copy, and that be trained
                weight.data = weight.data.contiguous()
            if detach_provenance(pyro.param(key, weight)) is not weight:
                raise ValueError(
                    f"something else was put in the place of {key!r}, which networks cannot take up (poutine.lift, "
                    "substitute or replay?); change the network's weights themselves"
                )
            self.registered[key] = weight

    @torch.no_grad()
    def load(self, networks: nn.Module) -> None:
        """Copies what was loaded under this name into the weights."""
        store, weights = pyro.get_param_store(), self._weights(networks)
        stored = dict(store.named_parameters())
        if all(stored.get(key) is weight for key, weight in weights.items()) and len(stored) == len(weights):
            return  # nothing else is there: as a rule
        held = {id(weight) for other in _bound for weight in other.registered.values()}
        loaded = {key: t for key, t in stored.items() if DIVIDER in key and id(t) not in held}
        if not loaded:
            return
        own = {key: t for key, t in loaded.items() if key.startswith(self.name + DIVIDER)}
        if own or not any(key in store for key in weights):
            self._require_meant(own, loaded, weights)
        if own:
            self._require_fits(own, weights)
        for key, tensor in own.items():
            weights[key].copy_(tensor)
            del store[key]
            store[key] = weights[key]

    def _weights(self, networks: nn.Module) -> dict[str, Tensor]:
        return {f"{self.name}{DIVIDER}{n}": p for n, p in networks.named_parameters() if p.requires_grad}

    def _require_meant(self, own: dict[str, Tensor], loaded: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Weights like these were loaded under a name that no program has: nobody would notice that they are not used."""
        ours, names = {key.partition(DIVIDER)[2] for key in weights}, {other.name for other in _bound}
        split = [key.partition(DIVIDER) for key in loaded]
        others = sorted({name for name, _, weight in split if name not in names and weight in ours})
        if others and not (own and self.is_named):
            raise ValueError(
                f"the parameter store holds weights that were loaded under the name {', '.join(map(repr, others))}, which no "
                f"bound program has; this one is {self.name!r}. Say which is meant, bind(..., name={others[0]!r}), and bind "
                "all programs before the first runs; or take what is not meant out of the store"
            )

    def _require_fits(self, own: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        store = pyro.get_param_store()
        lacking = [key for key in weights if key not in store]
        surplus = [key for key in own if key not in weights]
        if surplus:
            raise ValueError(
                f"the parameter store holds {surplus[0]!r} ({len(surplus)} such), loaded, but {self.name!r} trains no such "
                "weight; bind the program and the kind of network that were saved, a trainable one: prior.copy()"
            )
        if lacking:
            raise ValueError(f"what was loaded into the parameter store lacks {lacking[0]!r} ({len(lacking)} such)")
        for key, tensor in own.items():
            if (tensor.shape, tensor.dtype) != (weights[key].shape, weights[key].dtype):
                raise ValueError(
                    f"{key!r} was loaded with shape {tuple(tensor.shape)} and {tensor.dtype}; the network has "
                    f"{tuple(weights[key].shape)} and {weights[key].dtype}: bind the kind of network that was saved"
                )


def _forget(registered: dict[str, Tensor]) -> None:
    """Takes a program's weights out of the store, but not those of another that has its name."""
    store = pyro.get_param_store()
    for key, weight in registered.items():
        if dict(store.named_parameters()).get(key) is weight:
            with suppress(KeyError):  # the same weights under the name of another binding
                del store[key]
