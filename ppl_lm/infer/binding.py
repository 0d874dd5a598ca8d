"""`bind`: a program and the networks it uses, as one module that Pyro and torch optimisers both understand."""

import inspect
import itertools
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pyro
from pyro.params.param_store import _MODULE_NAMESPACE_DIVIDER
from torch import nn

from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts

_numbers = itertools.count()


class Bound(nn.Module):
    """A program with all its arguments but the prompts; see `bind`."""

    def __init__(self, program: Callable[..., Any], *args: Any, **kwargs: Any):
        super().__init__()
        signature = inspect.signature(program)
        name = getattr(program, "__name__", type(program).__name__)
        try:
            given = signature.bind(None, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}{signature} cannot be bound: {error}") from None
        arguments = {**given.arguments}
        self._prompts_name = next(iter(arguments))
        del arguments[self._prompts_name]
        for parameter in signature.parameters.values():  # **kwargs of the program
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
            elif parameter.kind is parameter.VAR_POSITIONAL and parameter.name in arguments:
                raise TypeError(
                    f"{name}{signature}: programs with *{parameter.name} cannot be bound; name each argument"
                )
        self.program = program
        arguments = {k: _as_network(v) for k, v in arguments.items()}
        self.networks = nn.ModuleDict({k: v for k, v in arguments.items() if isinstance(v, nn.Module)})
        self.arguments = {
            k: _as_reward(v) if k in ("reward", "constraint") or _is_reward(v) else v
            for k, v in arguments.items()
            if not isinstance(v, nn.Module)
        }
        for network in self.networks.modules():
            if isinstance(network, LanguageModel) and not network.is_checked:
                network.self_check()
        self.name = f"{name}_{next(_numbers)}"
        weakref.finalize(self, _forget, self.name)

    @property
    def lm(self) -> LanguageModel | None:
        """The first language model among the networks: its tokenizer reads the prompts."""
        return next((m for m in self.networks.modules() if isinstance(m, LanguageModel)), None)

    def __reduce__(self) -> Any:
        """Copies and unpickled modules are bound anew, under a name of their own."""
        return _bind, (self.program, dict(self.networks), self.arguments)

    def forward(self, prompts: Any, **kwargs: Any) -> Any:
        if self.lm is not None and not (isinstance(prompts, Prompts) and prompts.vocabulary is self.lm.vocabulary):
            prompts = self.lm.prompts(prompts)
        for name, parameter in self.networks.named_parameters():
            if parameter.requires_grad:  # what pyro.module does, without its warning for each frozen weight
                pyro.param(f"{self.name}{_MODULE_NAMESPACE_DIVIDER}{name}", parameter)
        return self.program(prompts, **{**self.networks, **self.arguments, **kwargs})


def _as_network(value: Any) -> Any:
    """Lists, tuples and dictionaries of networks as modules, so that their weights are seen too."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, nn.Module) for v in value):
        return nn.ModuleList(value)
    if type(value) is dict and value and all(isinstance(v, nn.Module) for v in value.values()):
        return nn.ModuleDict(value)
    return value


def _as_reward(value: Any) -> Reward:
    return value if isinstance(value, Reward) else Reward(value)


def _is_reward(value: Any) -> bool:
    """Whether this is a function in the signature of rewards; other functions are passed on as they are."""
    if not (inspect.isroutine(value) or isinstance(value, partial)):
        return False
    try:
        parameters = inspect.signature(value).parameters
    except ValueError:  # of a built-in
        return False
    return "completions" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _bind(program: Callable[..., Any], networks: dict[str, nn.Module], arguments: dict[str, Any]) -> Bound:
    return Bound(program, **networks, **arguments)


def bind(program: Callable[..., Any], *args: Any, **kwargs: Any) -> Bound:
    """`program(prompts, *args, **kwargs)` as an `nn.Module` to be called with the prompts alone.

    Networks among the arguments, also in lists and dictionaries, become submodules; their trainable weights are
    registered in Pyro's parameter store under a name that no other bind uses, and leave the store with the module:
    running a notebook cell twice trains two guides. Functions that take `completions`, or any keyword, become `Reward`s.
    Prompts may be given as strings, chats, a dataset or `Prompts`.

    >>> target = bind(tilted, prior, reward=ppl_lm.rewards.vader, beta=0.2)   # doctest: +SKIP
    """
    return Bound(program, *args, **kwargs)


def require_separate(model: Any, guide: Any) -> None:
    """Raises ValueError if a guide shares trainable weights with its target, which would move as it is fitted."""
    if not (isinstance(model, nn.Module) and isinstance(guide, nn.Module)):
        return
    theirs = {id(p) for p in model.parameters() if p.requires_grad}
    shared = [name for name, p in guide.named_parameters() if p.requires_grad and id(p) in theirs]
    if shared:
        raise ValueError(
            f"the guide shares {len(shared)} trainable weights with its target, first {shared[0]!r}: fitting would move "
            "the target; bind the guide to prior.copy()"
        )


def _forget(name: str) -> None:
    store = pyro.get_param_store()
    for key in [k for k in store.keys() if k.startswith(name + _MODULE_NAMESPACE_DIVIDER)]:  # noqa: SIM118
        with suppress(KeyError):  # the same weights under the name of another binding
            del store[key]
