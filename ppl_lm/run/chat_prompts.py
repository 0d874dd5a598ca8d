"""Prompts as chats, `--chat` and `--system`: a text is the user's message, after the system's."""

from dataclasses import replace
from typing import Any

from ppl_lm.run.settings import Settings


def as_chats(settings: Settings) -> Settings:
    """The same settings with every prompt, held-out ones too, a chat where that was asked for: a text becomes the user's
    message, and each chat begins with the system's message, if there is one. What is so already stays.

    :raises ValueError: if a prompt is blank, or is a chat with another system message."""
    if not settings.chat:
        return settings

    def chats(prompts: list[Any]) -> list[Any]:
        return [_chat(i, prompt, settings.system) for i, prompt in enumerate(prompts)]

    held_out = None if settings.eval_prompts is None else chats(settings.eval_prompts)
    return replace(settings, prompts=chats(settings.prompts), eval_prompts=held_out)


def _chat(i: int, prompt: Any, system: str | None) -> list[Any]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(
                "chat: there is no prompt to be the user's message; give --prompts, a file with one a line"
            )
        prompt = [{"role": "user", "content": prompt}]
    if not (prompt and isinstance(prompt[0], dict)):
        return prompt  # which is refused where prompts are read
    first = prompt[0]
    if system is None or (first.get("role") == "system" and first.get("content") == system):
        return prompt
    if first.get("role") in ("system", "developer"):
        raise ValueError(
            f"system={system!r}, but prompt {i} is a chat with a {first['role']} message of its own, {first.get('content')!r}; "
            "leave out --system, or take that message out of the prompts"
        )
    return [{"role": "system", "content": system}, *prompt]
