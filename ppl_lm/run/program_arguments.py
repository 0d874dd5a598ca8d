"""A program's own arguments, `--set alpha=2`: which there are, and what the words stand for."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

KINDS = {
    float: "a finite number",
    int: "a whole number, by its annotation or default",
    bool: "true or false",
    str: "text",
}
SHARED = ("prior", "reward", "constraint", "beta")  # what programs are given by name, and guides alone:
FREE = ("lm", "adapted", "table", "twist")
OPTIONS = {"prior": "--lm", "reward": "--reward", "constraint": "--reward", "beta": "--beta"}
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def own_arguments(program: Callable[..., Any], available: Collection[str]) -> dict[str, type | None]:
    """Those of a program's arguments that the command does not give it itself, with the type of each: that of its annotation,
    or else of its default; None if it is none of float, int, bool and str.

    :param available: what it is given by name; the first argument, the prompts, is none of its own either."""
    hints = _hints(program)
    parameters = list(inspect.signature(program).parameters.values())[1:]
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in available]
    return {p.name: _kind(hints.get(p.name), p.default) for p in by_name}


def read_arguments(
    given: Mapping[str, Any], model: Callable[..., Any], guide: Callable[..., Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model is given and what the guide: of `given` those that each has, as its types; one that both have goes to
    both.

    :param given: name -> a word of the command line, or a value that was read before.
    :raises ValueError: if neither program has such an argument, or it is of another type; the message lists what there is."""
    theirs = [own_arguments(model, SHARED), own_arguments(guide, (*SHARED, *FREE))]
    for name in given:
        if name in SHARED or name in FREE:
            how = f": use {OPTIONS[name]}" if name in OPTIONS else ""
            raise ValueError(f"set: {name!r} is given by the command itself{how}")
        if not any(name in own for own in theirs):
            listed = [f"{n} ({k.__name__})" for own in theirs for n, k in own.items() if k is not None]
            raise ValueError(
                f"set: neither the model {model.__name__!r} nor the guide {guide.__name__!r} has an argument {name!r} of its "
                f"own; there is {', '.join(dict.fromkeys(listed)) or 'none'}"
            )
    of_model, of_guide = ({k: _value(k, v, own[k]) for k, v in given.items() if k in own} for own in theirs)
    return of_model, of_guide


def _hints(program: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(program))
    except Exception:  # an annotation that names what is imported for type checkers alone
        return {name: p.annotation for name, p in inspect.signature(program).parameters.items()}


def _kind(annotation: Any, default: Any) -> type | None:
    if annotation is inspect.Parameter.empty or annotation is None:
        annotation = None if default is inspect.Parameter.empty else type(default)
    several = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    annotations = typing.get_args(annotation) if several else (annotation,)
    kinds = [
        kind for a in annotations for kind in KINDS if a is kind or a == kind.__name__
    ]  # annotations may be strings
    return None if not kinds else float if kinds[0] is int and float in kinds else kinds[0]


def _value(name: str, value: Any, kind: type | None) -> Any:
    def refuse() -> NoReturn:
        raise ValueError(f"set: {name}={value}; it takes {KINDS[kind]}")  # pyright: ignore[reportArgumentType]

    if kind is None:
        raise ValueError(
            f"set: {name} is neither a number nor text, as far as its annotation or default says; write it into the program, "
            "or bind it in Python"
        )
    if not isinstance(value, str):  # read before, as a run's own
        same = type(value) is kind or {type(value), kind} == {float, int} and value == kind(value)
        return kind(value) if same else refuse()
    if kind is str:
        return value
    if kind is bool:
        return TRUTH[value.lower()] if value.lower() in TRUTH else refuse()
    try:
        number = kind(value)
    except ValueError:
        refuse()
    return number if math.isfinite(number) else refuse()
