"""`bind`: a program and the networks it uses, as one module that Pyro and torch optimisers both understand."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ppl_lm.infer.stored_weights import StoredWeights
from ppl_lm.likelihood.reward import Reward, takes_completions
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompt_columns import as_columns
from ppl_lm.lm.prompts import Prompts


class Bound(nn.Module):
    """A program with all its arguments but the prompts; see `bind`."""

    def __init__(self, program: Callable[..., Any], store_name: str | None, *args: Any, **kwargs: Any):
        super().__init__()
        signature = inspect.signature(program)
        name = getattr(program, "__name__", type(program).__name__)
        if "name" in signature.parameters:
            raise TypeError(
                f"{name}{signature} cannot be bound: bind takes name= for itself; call the argument something else"
            )
        try:
            given = signature.bind(None, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}{signature} cannot be bound: {error}") from None
        arguments = {**given.arguments}
        del arguments[next(iter(arguments))]  # the prompts
        for parameter in signature.parameters.values():  # **kwargs of the program
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
            elif parameter.kind is parameter.VAR_POSITIONAL and parameter.name in arguments:
                raise TypeError(
                    f"{name}{signature}: programs with *{parameter.name} cannot be bound; name each argument"
                )
        self.program = program
        defaults = {k: parameter.default for k, parameter in signature.parameters.items()}
        arguments = {
            k: v if v is None and defaults.get(k, ...) is None else _as_network(_as_rewards(k, v))
            for k, v in arguments.items()
        }
        self.networks = nn.ModuleDict({k: v for k, v in arguments.items() if isinstance(v, nn.Module)})
        self.arguments = {k: v for k, v in arguments.items() if not isinstance(v, nn.Module)}
        for network in self.networks.modules():
            if isinstance(network, LanguageModel) and not network.is_checked:
                network.self_check()
        self._stored = StoredWeights(store_name, name)

    @property
    def name(self) -> str:
        """Under which the trainable weights stand in Pyro's parameter store."""
        return self._stored.name

    @name.setter
    def name(self, name: str) -> None:
        self._stored = StoredWeights(name, name)

    @property
    def lm(self) -> LanguageModel | None:
        """The first language model among the networks, with what was loaded for it: its tokenizer reads the prompts."""
        self._stored.load(self.networks)
        return next((m for m in self.networks.modules() if isinstance(m, LanguageModel)), None)

    def __reduce__(self) -> Any:
        """Copies and unpickled modules are bound anew, under a name of their own."""
        return _bind, (self.program, dict(self.networks), self.arguments)

    def forward(self, prompts: Any, **kwargs: Any) -> Any:
        lm = self.lm
        if lm is not None and not (isinstance(prompts, Prompts) and prompts.vocabulary is lm.vocabulary):
            prompts = lm.prompts(prompts)
        self._stored.register(self.networks)
        return self.program(prompts, **{**self.networks, **self.arguments, **kwargs})


def _as_network(value: Any) -> Any:
    """Lists, tuples and dictionaries of networks as modules, so that their weights are seen too."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, nn.Module) for v in value):
        return nn.ModuleList(value)
    if type(value) is dict and value and all(isinstance(v, nn.Module) for v in value.values()):
        return nn.ModuleDict(value)
    return value


def _as_rewards(parameter: str, value: Any) -> Any:
    """A `Reward` of what is one by the parameter that it is given for, or by its own signature, of whatever kind it is; also
    in lists, tuples and dictionaries of rewards. Anything else as it is."""
    if isinstance(value, Reward):
        return value
    if parameter in ("reward", "constraint") or takes_completions(value):
        return Reward(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Reward) or takes_completions(v) for v in value):
        return [_as_rewards(parameter, v) for v in value]
    if type(value) is dict and value and all(isinstance(v, Reward) or takes_completions(v) for v in value.values()):
        return {k: _as_rewards(parameter, v) for k, v in value.items()}
    return value


def _bind(program: Callable[..., Any], networks: dict[str, nn.Module], arguments: dict[str, Any]) -> Bound:
    return Bound(program, None, **networks, **arguments)


def bind(program: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Bound:
    """`program(prompts, *args, **kwargs)` as an `nn.Module` to be called with the prompts alone.

    Networks among the arguments, also in lists and dictionaries, become submodules; their trainable weights are
    registered in Pyro's parameter store under a name that no other bind uses, and leave the store with the module:
    running a notebook cell twice trains two guides. What `pyro.get_param_store().load(file)` has read under that name is
    taken over when the program is next run, or its `lm` asked for.
    What is given as `reward` or `constraint`, callables of any kind that take `completions` or `completion_ids`, and functions
    that take any keyword, become `Reward`s.
    Prompts may be given as strings, chats, a dataset or `Prompts`.

    :param name: under which the weights stand in the parameter store; None: the program's own, numbered while another bind
        of it is alive. Give one to what you save: a new process finds it again, whatever else either of them bound. The
        optimiser's state, `optim.load(file)`, is for a new optimiser.
    :raises TypeError: if the arguments are not the program's, one of them is called `name`, or a reward is none.

    >>> target = bind(tilted, prior, reward=ppl_lm.rewards.vader, beta=0.2)   # doctest: +SKIP
    """
    return Bound(program, name, *args, **kwargs)


def read_once(prompts: Any, *programs: Any) -> Any:
    """Prompts that several programs can be called with, however they are given, and asked for their number: tokenised by the
    first language model of bound ones; as they are given where one is a plain function, to which nothing else is promised,
    what can be read only once as a list or a dictionary of columns.

    :param programs: those that are None are no programs."""
    if isinstance(prompts, Prompts):
        return prompts
    programs = tuple(program for program in programs if program is not None)
    if all(isinstance(program, Bound) for program in programs):
        lm = next((lm for program in programs if (lm := program.lm) is not None), None)
        if lm is not None:
            return lm.prompts(prompts)
    if hasattr(prompts, "__len__"):
        return prompts
    texts, columns = as_columns(prompts)
    return {"prompt": texts, **columns} if columns else texts


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
