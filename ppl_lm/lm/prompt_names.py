"""Prompts by name: a readable string for each, no two alike."""

from collections.abc import Iterable, Mapping
from typing import Any


def readable(prompt: Any) -> str:
    """A text as it is; of a chat `role: content` of each message."""
    if isinstance(prompt, str):
        return prompt
    return " | ".join(f"{message.get('role')}: {content(message.get('content'))}" for message in prompt)


def last_message(prompt: Any) -> str:
    """What tells prompts apart in little room: a text as it is, of a chat the last message, with its role."""
    return readable(prompt if isinstance(prompt, str) else prompt[-1:])


def content(given: Any) -> str:
    """A message's text, of parts those that are texts."""
    if isinstance(given, str):
        return given
    parts = given if isinstance(given, list | tuple) else [given]
    texts = [part.get("text", "") if isinstance(part, Mapping) else part for part in parts]
    return " ".join(str(text) for text in texts if text is not None)


def distinct(names: Iterable[str]) -> list[str]:
    """The same names, but a second one like an earlier one is followed by " (2)", and so on.

    >>> distinct(["a", "a", "b"])
    ['a', 'a (2)', 'b']
    """
    given = list(names)
    taken, counts, made = {*given}, dict[str, int](), list[str]()
    for name in given:
        new, count = name, counts.get(name, 0) + 1
        while count > 1 and (new := f"{name} ({count})") in taken:
            count += 1
        taken.add(new)
        counts[name] = count
        made.append(new)
    return made
