"""A chat as token ids: what its template makes of it, with the contents of its messages as plain text."""

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

OWN = "\U0010fffd"  # encloses the stand-ins of a template's own control tokens
NAMES = ("role", "type")  # of a message or a part: words that templates compare with


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The control tokens by their ids: what decoding leaves out. Added tokens that are not special are ordinary text."""
    return _special_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any, size: int) -> dict[int, str]:
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return named | {i: token.content for i, token in added.items() if token.special}


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | str | None = None,
    documents: Sequence[Mapping[str, str]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> list[int]:
    """Ids of what `apply_chat_template` makes of a chat, up to the assistant's turn (`add_generation_prompt`), or up to where
    the last message stops if that is the assistant's and no call of a tool (`continue_final_message`).

    They are the tokenizer's of that very string, but that control tokens which the messages, tools or documents spell are
    encoded as plain text. Which these are is found by rendering the chat again with one of the token's characters exchanged
    for another in all of its texts: the rendered strings differ just where that character is not the template's own.

    :param tools: JSON schemas or functions, or these schemas as one JSON string.
    :param chat_template_kwargs: what else the template reads, by name, such as `enable_thinking`.
    :param whole: the chat is over: its last message ends as the others do, and no turn follows.
    :raises ValueError: if there is no template, it fails, or it changes texts so that their control tokens cannot be told
        from its own; of an argument that is not for templates."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "this tokenizer has no chat template: give prompts as strings, not as messages, or set one, "
            "lm.vocabulary.tokenizer.chat_template = ..."
        )
    options = {} if chat_template_kwargs is None else chat_template_kwargs
    if not isinstance(options, Mapping):
        raise ValueError(f"chat_template_kwargs is {options!r}; give a mapping from names to values")
    of_the_call = {*inspect.signature(tokenizer.apply_chat_template).parameters} - {"documents", "chat_template"}
    if wrong := sorted(of_the_call & {*options}):
        raise ValueError(f"chat_template_kwargs has {wrong}, which are not for the template; leave them out")
    options = dict(options)
    if isinstance(tools, str):  # as data sets store what has no fixed keys
        tools = json.loads(tools)
    tools = None if tools is None else [tool if isinstance(tool, Mapping) else _schema(tool) for tool in tools]
    texts = {"conversation": list(messages), "tools": tools, "documents": options.pop("documents", documents)}
    last = messages[-1]
    goes_on = last.get("role") == "assistant" and last.get("content") is not None and not last.get("tool_calls")
    ending = {"add_generation_prompt": not (goes_on or whole), "continue_final_message": goes_on and not whole}

    def render(texts: dict[str, Any]) -> str:
        return tokenizer.apply_chat_template(**texts, tokenize=False, **ending, **options)

    try:
        rendered = render(texts)
    except Exception as error:  # a template is a program: anything may be raised
        raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error
    ids = list(tokenizer(rendered, add_special_tokens=False, split_special_tokens=False)["input_ids"])
    special, given = special_tokens(tokenizer), "".join(_strings(texts))
    possible = {i: special[i] for i in ids if i in special and _may_spell(given, special[i])}
    if not possible:
        return ids
    roles = " ".join(str(message.get("role")) for message in messages)
    if spelled := [token for token in possible.values() if token in roles]:
        raise ValueError(f"a message's role spells the control token {spelled[0]!r}; give a plain name such as 'user'")
    own = _own(tokenizer, texts, rendered, render, possible)
    return ids if own is None else _encode(tokenizer, rendered, own)


Places = list[tuple[int, int, int]]  # start and end in the rendered chat, id


def _own(
    tokenizer: Any,
    texts: dict[str, Any],
    rendered: str,
    render: Callable[[dict[str, Any]], str],
    possible: dict[int, str],
) -> Places | None:
    """Where the template's own control tokens stand; None if all are its own.

    :param possible: those that the texts may spell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _undecided(next(iter(possible.values())), "this tokenizer does not say where its tokens stand")
    own: Places = []
    special, all_own = special_tokens(tokenizer), True
    marks: dict[str, set[int] | None] = {}
    exact = backend.encode(rendered, add_special_tokens=False)
    for i, (start, end) in zip(exact.ids, exact.offsets, strict=True):
        if i not in special:
            continue
        at = rendered.find(special[i], start, end)
        if at < 0:
            if i in possible and special[i] != tokenizer.unk_token:
                raise _undecided(special[i], f"the tokenizer reads it in {rendered[start:end]!r}")
        elif i in possible and _is_given(texts, rendered, at, special[i], render, marks):
            all_own = False
        else:
            own.append((at, at + len(special[i]), i))
    return None if all_own else own


def _undecided(token: str, why: str) -> ValueError:
    return ValueError(
        f"a text of the chat may spell the control token {token!r}, and {why}; take it out of the text, or give the prompt's "
        "tokens, Prompts.from_ids"
    )


def _may_spell(given: str, token: str) -> bool:
    """Whether characters of these texts may make up the token, however a template moves them: letters may change case."""
    return all(c in given for c in token if _is_sign(c))


def _is_sign(c: str) -> bool:
    return not (c.isalnum() or c == "_")


def _is_given(
    texts: dict[str, Any],
    rendered: str,
    at: int,
    token: str,
    render: Callable[[dict[str, Any]], str],
    marks: dict[str, set[int] | None],
) -> bool:
    """Whether the control token that stands at this place of the rendered chat comes from its texts.

    :param marks: character -> where the rendered chat has it from a text, None if that cannot be told; remembered."""
    for c in sorted({*token.lower()}, key=lambda c: (not _is_sign(c), c)):  # signs first: names have none
        if c not in marks:
            marks[c] = _marked(texts, rendered, c, render)
        places = marks[c]
        if places is not None:
            return any(at + n in places for n in range(len(token)))
    raise _undecided(token, "the chat template changes texts so that its own cannot be told from theirs")


def _marked(texts: dict[str, Any], rendered: str, c: str, render: Callable[[dict[str, Any]], str]) -> set[int] | None:
    """Where a character of the rendered chat stems from a text; None if the template does something else without it."""
    other = "1" if c == "0" else "0"  # a digit: no filter changes one
    try:
        changed = render({name: _without(value, c, other) for name, value in texts.items()})
    except Exception:  # the template may refuse the changed chat, in whatever way
        return None
    if len(changed) != len(rendered):
        return None
    places = {n for n, (old, new) in enumerate(zip(rendered, changed, strict=True)) if old != new}
    return places if all(rendered[n].lower() == c and changed[n] == other for n in places) else None


def _without(value: Any, c: str, other: str) -> Any:
    """The same data with another character for `c` in all texts; for a letter not in keys and names, which templates read."""
    if isinstance(value, str):
        return value.replace(c, other).replace(c.upper(), other) if len(c.upper()) == 1 else value.replace(c, other)
    if isinstance(value, Mapping):
        sign = _is_sign(c)
        return {
            (_without(k, c, other) if sign else k): v if k in NAMES and not sign else _without(v, c, other)
            for k, v in value.items()
        }
    return [_without(v, c, other) for v in value] if isinstance(value, (list, tuple)) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _schema(tool: Any) -> Any:
    from transformers.utils.chat_template_utils import get_json_schema

    return get_json_schema(tool) if callable(tool) else tool


def _encode(tokenizer: Any, rendered: str, own: Places) -> list[int]:
    """Ids of a string in which only the control tokens at these places are some."""
    if OWN in rendered:
        raise ValueError(f"a text of the chat has the character {OWN!a}, which is needed here; take it out")
    backend, stands_for = _with_stand_ins(tokenizer, len(tokenizer))
    pieces, done = [], 0
    for start, end, i in own:
        pieces += [rendered[done:start], f"{OWN}{i}{OWN}"]
        done = end
    ids: list[int] = backend.encode("".join([*pieces, rendered[done:]]), add_special_tokens=False).ids
    if sum(i in stands_for for i in ids) != len(own):
        raise ValueError("the chat's control tokens cannot be told from those its texts spell; take these out")
    return [stands_for.get(i, i) for i in ids]


@lru_cache(maxsize=4)
def _with_stand_ins(tokenizer: Any, size: int) -> tuple[Any, dict[int, int]]:
    """A copy that takes no text for a control token, but has an ordinary token beside each, which is cut out of a text by
    the same rules; and which it stands for."""
    from tokenizers import AddedToken

    try:
        backend, stands_for = copy.deepcopy(tokenizer.backend_tokenizer), {}
    except Exception as error:  # of parts written in Python, which the tokenizers package cannot copy
        raise ValueError(
            f"a text of the chat spells a control token, but the tokenizer has no copy: {error}"
        ) from error
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    for i, token in backend.get_added_tokens_decoder().items():
        if token.special:
            rules = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            backend.add_tokens([AddedToken(f"{OWN}{i}{OWN}", special=False, **rules)])
            stands_for[int(backend.token_to_id(f"{OWN}{i}{OWN}"))] = int(i)
    return backend, stands_for
