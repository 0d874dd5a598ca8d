"""Options that say which posterior is asked for, and how their words are read."""

from typing import Annotated, Any

import typer

Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        help="vader, length, contains:WORD, hf:FOLDER[:LABEL] (a classifier or reward model), or FILE.py:NAME. Of several, "
        "each after a --reward of its own, the weighted sum.",
        show_default="vader",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--reward-weights", metavar="W,W,...", help="One for each --reward.", show_default="1 each"),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="An argument of MODEL's (or the guide's) own: power has alpha. May be repeated.",
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Each prompt that is a text is the user's message of a chat.")]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="The system's message of each chat; implies --chat.")
]


def asked(
    reward: list[str] | None, weights: str | None, arguments: list[str] | None, chat: bool, system: str | None
) -> dict[str, Any]:
    """Those of these settings that were given.

    :raises ValueError: of words that cannot be read."""
    from ppl_lm.cli.console import absolute

    given = {
        "reward": [absolute(name) for name in reward or []] or None,
        "reward_weights": None if weights is None else _numbers(weights),
        "arguments": _assignments(arguments or []) or None,
        "chat": chat or system is not None or None,
        "system": system,
    }
    return {name: value for name, value in given.items() if value is not None}


def _numbers(words: str) -> list[float]:
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"reward-weights={words!r}; give numbers with commas between them, such as 1,0.5") from None


def _assignments(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ValueError(f"set: {word!r}; give NAME=VALUE, such as alpha=2")
        if name in found:
            raise ValueError(f"set: {name} is given twice, as {found[name]!r} and as {value!r}; give it once")
        found[name] = value
    return found
