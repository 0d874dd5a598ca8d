"""`Reward`: a reward function in TRL's signature, callable on token sequences from inside a Pyro program.

A reward function scores a flat list of texts: `f(prompts, completions, completion_ids=None, **columns) -> list[float]`.
A Pyro program scores a tensor of token ids with any leading dimensions: plates, particles, enumeration. `Reward` is the
step between the two, and the one door at which a bad reward is refused.
"""

import asyncio
import copy
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from math import isfinite, prod
from typing import Any, Never

import numpy as np
import torch
from jaxtyping import Float64, Int
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor, nn

from ppl_lm.likelihood.reward_values import RewardError, as_number, as_rewards, short
from ppl_lm.lm import meter
from ppl_lm.lm.network import Network
from ppl_lm.lm.prompts import Prompts


class RewardTimeout(RewardError):
    """A reward function did not answer in time."""


SUM_OF_REWARDS = (
    "rewards are not added or scaled as objects: give ppl_lm.likelihood.WeightedRewards([first, second], weights=[1.0, 0.5]), "
    "which records each; or a program of your own that takes two rewards, each bound by its name"
)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leaves the global random states of Python, NumPy and torch (CUDA included) as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


_asked: ContextVar[bool] = ContextVar("asked", default=True)


@contextmanager
def unasked() -> Iterator[None]:
    """Inside the block every `Reward` is 0, or `r_max` where that is less, and no function is called."""
    token = _asked.set(False)
    try:
        yield
    finally:
        _asked.reset(token)


class Reward:
    """Wraps a reward function; `reward(prompts, x)` is r(x | prompt), in the unit of the function.

    :param function: any callable in TRL's signature, plain or `async`: a function, an object, a module. It is given, by
        name, those of `prompts`, `completions`, `completion_ids` and the prompts' columns that it accepts, as copies. For
        chat prompts a completion is `[{"role": "assistant", "content": text}]`. Its numbers are of any kind that float64 holds.
    :param r_max: a bound that no reward exceeds; if None, `function.r_max` where there is one.
    :param timeout: seconds that one call (all completions together) may take; None waits for ever. A plain function
        that hangs is left behind in a daemon thread, since Python cannot stop it.

    >>> reward = Reward(lambda completions: [float(len(text)) for text in completions])
    >>> reward(prompts, x)  # doctest: +SKIP
    tensor([12., 7.], dtype=torch.float64)
    """

    def __init__(self, function: Callable[..., Any], r_max: float | None = None, timeout: float | None = None) -> None:
        if isinstance(function, Reward):
            if type(function) is not Reward:
                raise TypeError(f"{function!r} is a reward of its own kind already: pass it as it is")
            r_max = function.r_max if r_max is None else r_max
            timeout = function.timeout if timeout is None else timeout
            function = function.function
        require_reward(function)
        r_max = getattr(function, "r_max", None) if r_max is None else r_max
        bound, seconds = as_number(r_max), as_number(timeout)
        if r_max is not None and (bound is None or not isfinite(bound)):
            raise ValueError(f"r_max={short(r_max)}; give a finite number, or None where rewards have no bound")
        if timeout is not None and not (seconds is not None and seconds > 0):
            raise ValueError(f"timeout={short(timeout)} seconds; give a number above 0, or None to wait for ever")
        self.function = function
        named = function.func if isinstance(function, partial) else function
        self.name = self.__name__ = getattr(named, "__name__", type(named).__name__)
        self.r_max, self.timeout = bound, seconds

    def __repr__(self) -> str:
        return f"Reward({self.name}, r_max={self.r_max}, timeout={self.timeout})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`(prompts, x)` with `Prompts` and token ids is `score`, with the provenance of both: `model_graph` and
        `TraceGraph_ELBO` follow values by it. Anything else goes to the function as it is."""
        if len(args) == 2 and not kwargs and hasattr(args[0], "decode") and isinstance(args[1], Tensor):
            prompts, x = args
            provenance = get_provenance(x) | get_provenance(prompts.ids)
            if provenance:
                prompts, x = replace(prompts, ids=detach_provenance(prompts.ids)), detach_provenance(x)
            return track_provenance(self.score(prompts, x), provenance)
        if len(args) == 2 and hasattr(args[0], "decode"):
            raise RewardError(
                f"reward {self.name!r} needs token ids of shape (..., T) beside the prompts, not {short(args[1])}; of texts "
                "lm.completions makes them, also for poutine.condition"
            )
        return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the function has besides, such as an object's own methods."""
        if name.startswith("__") or "function" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.function, name)

    def _no_arithmetic(self, *_: Any) -> Never:
        raise TypeError(SUM_OF_REWARDS)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _no_arithmetic

    def score(self, prompts: Prompts, x: Int[Tensor, "*#S T"]) -> Float64[Tensor, "*#S"]:
        """The reward of each completion, float64, detached, on x's device.

        :param prompts: `Prompts` of batch shape (B,) or (K, B).
        :param x: token ids; its leading dimensions broadcast against the prompts' batch shape.
        :raises RewardError: if the function raises, or does not return one real number for each completion. NaN, None
            and +inf are refused; -inf is a hard constraint and allowed.
        :raises RewardTimeout: if it takes longer than `timeout`.
        """
        if x.is_floating_point() or x.is_complex() or x.ndim == 0:
            raise RewardError(f"reward {self.name!r} needs token ids of shape (..., T), got {x.dtype} {tuple(x.shape)}")
        try:
            shape = torch.broadcast_shapes(x.shape[:-1], prompts.batch_shape)
        except RuntimeError as error:
            raise RewardError(
                f"reward {self.name!r} was given completions of shape {tuple(x.shape)}, whose leading dimensions do "
                f"not broadcast against the prompts' batch shape {tuple(prompts.batch_shape)}"
            ) from error
        if prod(shape) == 0 or not _asked.get():
            return torch.full(shape, min(0.0, self.r_max or 0.0), dtype=torch.float64, device=x.device)
        return self._scored(prompts, x, shape)

    def _scored(self, prompts: Prompts, x: Int[Tensor, "*#S T"], shape: torch.Size) -> Float64[Tensor, "*S"]:
        """`score` of at least one completion; a reward of another kind says here what it is."""
        n = prod(shape)
        rows = torch.arange(prod(prompts.batch_shape)).reshape(prompts.batch_shape).expand(shape).flatten().tolist()
        ids = x.detach().expand(*shape, x.shape[-1]).reshape(n, -1)  # (N, T)
        texts: list[str] = prompts.decode(ids.reshape(*shape, -1))

        def repeated(items: list[Any]) -> list[Any]:
            return [items[row] if isinstance(items[row], str) else copy.deepcopy(items[row]) for row in rows]

        repeated_prompts = repeated(prompts.texts)
        inputs = {name: repeated(column) for name, column in prompts.columns.items()}
        inputs["prompts"] = repeated_prompts
        inputs["completions"] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(repeated_prompts, texts, strict=True)
        ]
        inputs["completion_ids"] = prompts.completion_ids(ids)
        first = f"first prompt {short(prompts.texts[rows[0]])}, first completion {short(texts[0])}"

        meter.add(reward_calls=n)
        returned = self._call(self._accepted(inputs), first)
        return torch.tensor(
            as_rewards(returned, texts, self.name, self.r_max), dtype=torch.float64, device=x.device
        ).reshape(shape)

    def _accepted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Those of `inputs` that the function's signature accepts."""
        try:
            signature = signature_of(self.function)
        except ValueError:  # some built-in callables have none
            return inputs
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            inputs = {name: value for name, value in inputs.items() if kinds.get(name) in by_name}
        try:
            signature.bind(**inputs)
        except TypeError as error:
            raise RewardError(
                f"reward {self.name!r} has the signature {signature}: {error}. It is called by name with prompts, "
                "completions, completion_ids and the columns of the prompts' data set, as far as it accepts them. A network "
                "of the program's own is bound by another name than reward or constraint"
            ) from error
        return inputs

    def _call(self, inputs: dict[str, Any], first: str) -> Any:
        """What the function returns; whatever it raises becomes a `RewardError`, however long it takes a timeout."""

        def answer() -> Any:
            returned = self.function(**inputs)
            if self.timeout is None and inspect.isawaitable(returned):
                return _in_thread(lambda: _await(returned, None), None)  # the caller's thread may be running a loop
            return _await(returned, self.timeout)

        try:
            with preserved_rng():
                return answer() if self.timeout is None else _in_thread(answer, self.timeout)
        except _Unanswered:
            message = f"reward {self.name!r} did not answer within {self.timeout:g} seconds; {first}"
            raise RewardTimeout(message) from None
        except Exception as error:
            message = f"reward {self.name!r} raised {type(error).__name__}: {error}; {first}"
            raise RewardError(message) from error


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """What a call takes by name: of a module its `forward`'s.

    :raises ValueError: of some built-in callables, which have none."""
    return inspect.signature(function.forward if isinstance(function, nn.Module) else function)


def takes_completions(function: Any) -> bool:
    """Whether a callable of whatever kind asks for `completions` or `completion_ids` by name, as rewards do; or is a function
    that takes anything by name. What takes anything but is no function may be a network or a tokenizer."""
    if not callable(function) or inspect.isclass(function):
        return False
    try:
        parameters = signature_of(function).parameters
    except (ValueError, TypeError):  # of a built-in
        return False
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    is_function = inspect.isroutine(function) or isinstance(function, partial)
    return "completions" in parameters or "completion_ids" in parameters or (is_function and anything)


def require_reward(function: Any) -> None:
    """:raises TypeError: if this is no callable that could score completions; the message says what to give instead."""
    what = "a reward is a function f(prompts, completions, ...) -> list of floats"
    if isinstance(function, str):
        raise TypeError(
            f"{what}; got {function!r}, a name, which the command line alone reads: give the function, such as "
            "ppl_lm.rewards.vader"
        )
    if isinstance(function, (list, tuple, set, dict)):
        raise TypeError(f"{what}; got a {type(function).__name__}: {SUM_OF_REWARDS}")
    if inspect.isclass(function):
        raise TypeError(f"{what}; got the class {function.__name__}: give an instance of it")
    if isinstance(function, Network):
        raise TypeError(
            f"{what}; got a language model: bind one by another argument's name, or score texts with it yourself"
        )
    is_pipeline = type(function).__module__.startswith("transformers.pipelines")
    is_pretrained = isinstance(function, nn.Module) and hasattr(getattr(function, "config", None), "model_type")
    if is_pipeline or (is_pretrained and not takes_completions(function)):
        raise TypeError(
            f"{what}; got {type(function).__name__} of Hugging Face's: for a sequence classifier give "
            "ppl_lm.rewards.classifier(model, label, tokenizer), for one of a single logit ppl_lm.rewards.reward_model(model, "
            "tokenizer); around another write a function of texts"
        )
    if not callable(function):
        raise TypeError(f"{what}; got {function!r}")


class _Unanswered(Exception):
    """Internal: `_in_thread` gave up. Not `TimeoutError`, which the function itself may raise."""


def _await(returned: Any, timeout: float | None) -> Any:
    """The value of an awaitable, from a fresh event loop; anything else as it is."""
    if not inspect.isawaitable(returned):
        return returned
    # Cancels a coroutine that outlived `_in_thread`; one second later, so that it is `_in_thread` that reports.
    return asyncio.run(asyncio.wait_for(returned, None if timeout is None else timeout + 1))


def _in_thread(function: Callable[[], Any], timeout: float | None) -> Any:
    """`function()` in a thread of its own, so that waiting can end on every platform and in a running event loop."""
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # handed to the caller
            failure.append(error)

    thread = threading.Thread(target=work, name="reward", daemon=True)
    thread.start()
    thread.join(timeout)
    if failure:
        raise failure[0]
    if not outcome:
        raise _Unanswered
    return outcome[0]
