"""From what a user types to programs, bound to their arguments: `tilted`, or `path/to/file.py:name`."""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ppl_lm.infer.binding import Bound, bind
from ppl_lm.likelihood.reward import preserved_rng
from ppl_lm.likelihood.rewards import contains, length, vader
from ppl_lm.likelihood.sequence_classifier import by_name
from ppl_lm.likelihood.weighted_rewards import WeightedRewards
from ppl_lm.lm.checking.tolerances import is_half
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts
from ppl_lm.run.names import from_file, is_file, shipped, split_folder
from ppl_lm.run.program_arguments import FREE, SHARED, own_arguments, read_arguments
from ppl_lm.run.saved_guide import read_guide
from ppl_lm.run.settings import Settings

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Programs:
    """A run's programs, bound, with their prior and prompts, and the settings that they were built from."""

    settings: Settings
    model: Bound
    guide: Bound
    prior: LanguageModel
    prompts: Prompts


def build(settings: Settings, fitted: Path | None = None, trainable: bool = False) -> Programs:
    """Loads the LM and binds the programs; with `fitted`, the guide's network is read from that folder.

    :param trainable: whether that network is to be fitted further.
    :raises ValueError: on anything that does not exist or does not fit together, by name."""
    if not 0 < settings.beta < math.inf:
        raise ValueError(f"beta={settings.beta}; the reward's temperature must be above 0")
    model, guide = resolve(settings.model, "models"), resolve(settings.guide, "guides")
    own = read_arguments(settings.arguments, model, guide)
    if settings.device is not None:
        try:
            torch.empty(0, device=settings.device)
        except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: by device and build
            raise ValueError(
                f"device={settings.device!r} cannot be used here; give cpu, or cuda where there is one: {error}"
            ) from None
    reward = resolve_rewards(settings.reward, settings.reward_weights, settings.device)
    load: Any = {} if settings.lm is None else {"name_or_folder": settings.lm}
    if settings.dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={settings.dtype!r}; give one of {', '.join(DTYPES)}")
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    prior = LanguageModel.from_pretrained(
        **load, max_new_tokens=settings.max_new_tokens, device=settings.device, dtype=dtype
    )
    if settings.chat and getattr(prior.vocabulary.tokenizer, "chat_template", None) is None:
        which = "the language model that ships" if settings.lm is None else f"lm={settings.lm!r}"
        raise ValueError(
            f"chat: the tokenizer of {which} has no chat template, so it is no chat model; leave out --chat and --system, or "
            "give a chat model, --lm"
        )
    network = None
    if fitted is not None:
        network = read_guide(fitted, prior, settings.max_new_tokens)
        network.vocabulary.require_same(prior.vocabulary, f"{fitted.name} and the prior")
        network = network if trainable else network.requires_grad_(False)
    target, approximation = model_and_guide(settings, (model, guide), own, prior, network, reward)
    prompts = prior.prompts({"prompt": settings.prompts, **settings.columns})
    prior(prompts)  # refuses prompts that do not fit the context
    return Programs(replace(settings, arguments=own[1] | own[0]), target, approximation, prior, prompts)


def uncertainty(programs: Programs) -> list[str]:
    """What half precision does to a run's figures, in a line; none in single precision."""
    networks = [programs.prior, *programs.guide.networks.values()]
    noise = max((lm.noise for lm in networks if isinstance(lm, LanguageModel) and is_half(lm)), default=None)
    if noise is None:
        return []
    steps = programs.settings.max_new_tokens
    return [
        f"half precision moves the log-ratio of a text of {steps} tokens by about {noise * math.sqrt(steps):.2g} nats "
        "(standard deviation, from the self-check); figures finer than that need --dtype float32"
    ]


def resolve_rewards(
    names: Sequence[str], weights: Sequence[float] | None = None, device: str | None = None
) -> Callable[..., Any]:
    """One reward, or the sum of several, each recorded.

    :raises ValueError: if there are not as many weights as rewards."""
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"reward-weights={','.join(f'{w:g}' for w in weights)}: {len(weights)} for {len(names)} rewards; give one for each "
            "--reward, in their order"
        )
    rewards = [resolve_reward(name, device) for name in names]
    return rewards[0] if len(rewards) == 1 and weights is None else WeightedRewards(rewards, weights)


def resolve_reward(name: str, device: str | None = None) -> Callable[..., Any]:
    """The reward function that `name` stands for: `vader`, `length`, `contains:WORD`, `hf:FOLDER[:LABEL]` or
    `path/to/file.py:function`.

    :param device: of what is loaded; None: CUDA where there is one.

    >>> resolve_reward("vader") is vader
    True
    """
    if name in ("vader", "length"):
        return {"vader": vader, "length": length}[name]
    kind, _, argument = name.partition(":")
    if kind == "contains" and argument.strip():
        return contains(argument)
    if kind == "hf" and argument:
        return by_name(*split_folder(name), device)
    if not is_file(name):
        raise ValueError(
            f"reward {name!r} is unknown; give vader, length, contains:WORD, hf:FOLDER[:LABEL] or path/to/file.py:function"
        )
    with preserved_rng():
        return from_file(name, "reward")


def resolve(spec: str, package: str) -> Callable[..., Any]:
    """The program that `spec` names: a file of `package` ("models" or "guides"), or `path/to/file.py:name`.

    :raises ValueError: if there is none; the message lists what there is."""
    kind = package.removesuffix("s")
    if is_file(spec):
        return from_file(spec, kind)
    if spec not in shipped(package):
        raise ValueError(f"{kind} {spec!r} is unknown; give {', '.join(shipped(package))} or path/to/file.py:name")
    program = getattr(importlib.import_module(f"ppl_lm.{package}.{spec}"), spec, None)
    if not callable(program):
        raise ValueError(f"{kind} {spec!r}: the file has no function of its own name")
    return program


def guide_arguments(settings: Settings) -> dict[str, Any]:
    """Those of the programs' own arguments that the guide has, which stay with it whatever posterior it is for."""
    own = own_arguments(resolve(settings.guide, "guides"), (*SHARED, *FREE))
    return {name: value for name, value in settings.arguments.items() if name in own}


def require_adapter(settings: Settings) -> None:
    """:raises ValueError: if a rank is given, and the guide takes no adapter."""
    if "adapted" not in inspect.signature(resolve(settings.guide, "guides")).parameters:
        raise ValueError(f"rank={settings.rank}; the guide {settings.guide!r} has no adapter, give --guide lora")


def bind_named(
    program: Callable[..., Any], available: dict[str, Callable[[], Any]], what: str, own: dict[str, Any]
) -> Bound:
    """Binds a program's arguments by their names: each of `available` is made if the program asks for it.

    :param own: further arguments, of the program's own.
    :raises ValueError: if the program needs an argument that nothing here can give."""
    parameters = list(inspect.signature(program).parameters.values())[1:]
    missing = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in missing if name not in available and name not in own]
    if missing:
        raise ValueError(
            f"{what} {program.__name__} needs the argument {missing[0]!r}; on the command line these are given by name: "
            f"{', '.join(available)}; numbers and texts by --set {missing[0]}=VALUE. Give others a default, or bind in Python"
        )
    return bind(program, **{p.name: available[p.name]() for p in parameters if p.name in available}, **own)


def model_and_guide(
    settings: Settings,
    programs: tuple[Callable[..., Any], Callable[..., Any]],
    own: tuple[dict[str, Any], dict[str, Any]],
    prior: LanguageModel,
    fitted: Any,
    reward: Any,
) -> tuple[Bound, Bound]:
    """Binds both by argument names: `prior` is the frozen LM, `lm` a trainable copy, `adapted` the prior with a trainable
    adapter, `tempered` the prior at a trainable temperature, `table` a trainable table, `twist` a trainable twist, `reward`
    (or `constraint`) the reward, `beta` its temperature.

    :param own: further arguments of each, of its own.
    :param fitted: the guide's network where it has been fitted before, else None."""
    from ppl_lm.infer.twists.networks import twist_like
    from ppl_lm.lm.laws.temperature import tempered
    from ppl_lm.lm.table import table_like

    shared = {
        "prior": lambda: prior,
        "reward": lambda: reward,
        "constraint": lambda: reward,
        "beta": lambda: settings.beta,
    }
    free = {
        "lm": lambda: fitted or prior.copy(),
        "adapted": lambda: fitted or _adapted(prior, settings.rank, settings.seed),
        "tempered": lambda: fitted or tempered(prior, trainable=True),
        "table": lambda: fitted or table_like(prior),
        "twist": lambda: fitted or twist_like(prior),
    }
    return bind_named(programs[0], shared, "model", own[0]), bind_named(programs[1], shared | free, "guide", own[1])


def _adapted(prior: LanguageModel, rank: int, seed: int) -> LanguageModel:
    with preserved_rng():
        torch.manual_seed(seed)
        return prior.adapted(rank=rank)
