"""Completions as rewards are given them: plain, or as the assistant's messages of a chat."""

from collections.abc import Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]  # plain text, or the assistant's messages


def text(completion: Completion) -> str:
    """The text of a completion, plain or chat.

    >>> text([{"role": "assistant", "content": "Good soup."}])
    'Good soup.'
    """
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
